#!/bin/bash
# Installs the Debian packages that the integration tests use, or those it is given, where they are missing. Starts no
# service. They are clients and tools, and nginx for the agent; other servers that tests talk to run in the cluster
# (cluster/build-servers.sh).
set -eu
packages=(
  acl curl jq netcat-openbsd iproute2 nftables socat   # plumbing
  dnsutils                                             # dig, through UDP ASSOCIATE
  nghttp2-client                                       # an HTTP/2 peer that is not ours
  postgresql-client mariadb-client amqp-tools          # real clients of real servers
  proxychains4 python3 python3-socks                   # programs that know no proxy; python3-socks is PySocks
  chromium                                             # the browser test
  debootstrap                                          # cluster/build-servers.sh
  openssh-client openssh-server git iperf3             # developers' tools, and their servers in the cluster
  iputils-ping nodejs                                  # more programs under tp run
  nginx-light python3-grpcio python3-websockets python3-graphql-core # servers and clients on either side of an agent
)
[ $# = 0 ] || packages=("$@")
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} = 0 ] && exit 0

if [ "$(id -u)" != 0 ]; then
  echo "error: these Debian packages are needed, and only root can install them: ${missing[*]}" >&2
  exit 1
fi
echo "installing ${missing[*]}"
# A package that brings a service must not start it here: policy-rc.d is asked first, and removed again.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
