#!/bin/bash
# Builds lab.local/servers:lab: PostgreSQL, MariaDB, RabbitMQ, nginx and Python in one image, for tests that need real
# servers. Apart from build.sh, because only those tests load it. A second run with nothing changed does nothing.
# The packages are installed in a chroot that has its own PID and mount namespaces, and no service is started.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
OUT=$CLUSTER_DIR/servers
packages=(postgresql mariadb-server rabbitmq-server nginx openssl python3)
command -v debootstrap >/dev/null || { apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap >/dev/null; }

stamp=$(cd "$HERE" && cat build-servers.sh mkimage.py servers/* | sha256sum | cut -c1-16)
[ "$(cat "$OUT/stamp" 2>/dev/null)" != "$stamp" ] || { echo "servers image is up to date"; exit 0; }
[ "$(id -u)" = 0 ] || { echo "error: building the servers image needs root" >&2; exit 1; }

# The mirror and release that this machine itself installs from.
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(SITE) $(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v r="$release" '$3 == r { print $2; exit }')
[ -n "$mirror" ] || { echo "error: no Debian mirror for $release in this machine's apt sources" >&2; exit 1; }

rm -rf "$OUT"; mkdir -p "$OUT"
tree=$OUT/tree
trap 'rm -rf --one-file-system "$tree" "$OUT/layer.tar"' EXIT
echo "debootstrap $release"
debootstrap --variant=minbase "$release" "$tree" "$mirror" >"$OUT/build.log" 2>&1 || { tail -20 "$OUT/build.log" >&2; exit 1; }
cp /etc/resolv.conf "$tree/etc/resolv.conf"
cp -r /etc/apt/apt.conf.d "$tree/etc/apt/"
printf '#!/bin/sh\nexit 101\n' > "$tree/usr/sbin/policy-rc.d"; chmod +x "$tree/usr/sbin/policy-rc.d"
echo "installing ${packages[*]}"
# shellcheck disable=SC2016   # $0 and $@ belong to the inner shell
unshare --mount --pid --fork --propagation private sh -c '
  set -e
  mount -t proc proc "$0/proc"; mount -t tmpfs tmpfs "$0/tmp"; mount -t tmpfs tmpfs "$0/run"
  export DEBIAN_FRONTEND=noninteractive LC_ALL=C HOME=/root
  chroot "$0" apt-get update -qq
  chroot "$0" apt-get install -y -qq --no-install-recommends "$@"
  chroot "$0" apt-get clean
' "$tree" "${packages[@]}" >>"$OUT/build.log" 2>&1 || { tail -20 "$OUT/build.log" >&2; exit 1; }

# Each server makes its own data when a pod starts, so what the packages made is left out.
rm -rf "$tree"/var/lib/{apt/lists,mysql,postgresql,rabbitmq}/* "$tree"/var/cache/* "$tree"/var/log/* "$tree"/usr/share/{doc,man,locale}/* \
  "$tree"/etc/resolv.conf "$tree"/usr/sbin/policy-rc.d "$tree"/etc/apt/apt.conf.d
mkdir -p "$tree/start" "$tree"/var/log/{nginx,mysql,postgresql,rabbitmq}
cp "$HERE"/servers/* "$tree/start/"; chmod +x "$tree"/start/*
chroot "$tree" chown rabbitmq: /var/lib/rabbitmq /var/log/rabbitmq
tar --one-file-system --numeric-owner --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' -C "$tree" -cf "$OUT/layer.tar" .
python3 "$HERE/mkimage.py" "$OUT/servers.tar" lab.local/servers:lab --layer "$OUT/layer.tar" --cmd '["sleep", "infinity"]'
echo "$stamp" > "$OUT/stamp"
