#!/bin/bash
# The proxy before two small services, without Kubernetes. `make demo` builds the programs and runs this.
#
# Everything happens in namespaces of its own, for network, mounts and processes: a "workstation", and behind it a
# "shop" network that the workstation has no route into. They end with this script, however it ends; nothing is left.
# Root is not needed where the kernel gives users namespaces.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${TP_BIN_DIR:?"run this as: make demo"}

if [ -z "${TP_DEMO_INSIDE:-}" ]; then
  missing=(); for program in python3 curl ip unshare nsenter mount; do command -v "$program" >/dev/null || missing+=("$program"); done
  if [ ${#missing[@]} != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing what the demo needs: ${missing[*]}"
    apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 curl iproute2 util-linux mount >/dev/null
  elif [ ${#missing[@]} != 0 ]; then
    echo "error: the demo needs these programs: ${missing[*]}" >&2; exit 1
  fi
  namespaces=(--net --mount --pid --fork --kill-child --mount-proc)
  [ "$(id -u)" = 0 ] || namespaces=(--user --map-root-user "${namespaces[@]}")
  unshare "${namespaces[@]}" true 2>/dev/null || {
    echo "error: this machine gives this user no namespaces; run the demo as root: sudo make demo" >&2; exit 1; }
  folder=$(mktemp -d /tmp/tp-demo-XXXXXX); trap 'rm -rf "$folder"' EXIT
  TP_DEMO_INSIDE=$folder TP_DEMO_ROOT=$([ "$(id -u)" = 0 ] && echo yes || echo no) unshare "${namespaces[@]}" "${BASH_SOURCE[0]}"
  exit
fi

folder=$TP_DEMO_INSIDE
cd "$folder"
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() { echo "error: $*" >&2; exit 1; }

# The workstation's user is not root, where this machine lets us choose.
mkdir -m 700 home run; install -m 755 "$bin/tp" tp
user=(env -i HOME="$folder/home" XDG_RUNTIME_DIR="$folder/run" PATH="$folder:$PATH" LANG=C.UTF-8 TERM="${TERM:-dumb}")
if [ "$TP_DEMO_ROOT" = yes ]; then
  chmod 711 "$folder"; chown 65534:65534 home run
  user=(setpriv --reuid 65534 --regid 65534 --clear-groups -- "${user[@]}")
fi
# Shows a command as typed, runs it as the user, and keeps its output in $out.
try() { printf '$ %s\n' "$*"; out=$("${user[@]}" "$@" 2>&1) && code=0 || code=$?; [ -z "$out" ] || printf '%s\n' "$out" | sed 's/^/  /'; }

say "1. A network of its own, with two services in it: orders and stock."
ip link set lo up
unshare --net --mount sleep infinity & shop=$!
for _ in $(seq 100); do [ "$(readlink /proc/$shop/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break; sleep .02; done
in_shop() { nsenter -t "$shop" -n -m "$@"; }
ip link add to-shop type veth peer name eth0 netns "$shop"
ip addr add 192.0.2.1/30 dev to-shop; ip link set to-shop up
in_shop ip link set lo up; in_shop ip addr add 192.0.2.2/30 dev eth0; in_shop ip link set eth0 up
in_shop ip addr add 10.20.0.10/32 dev lo; in_shop ip addr add 10.20.0.11/32 dev lo
printf '127.0.0.1 localhost\n10.20.0.10 orders.shop.internal\n10.20.0.11 stock.shop.internal\n' > hosts
in_shop mount --bind "$folder/hosts" /etc/hosts
for service in 10.20.0.10=orders 10.20.0.11=stock; do
  in_shop python3 "$here/service.py" "${service%=*}" "${service#*=}" &
  for _ in $(seq 100); do in_shop curl --silent --output /dev/null "http://${service%=*}/" && break; sleep .1; done
done
echo "  orders.shop.internal = 10.20.0.10, stock.shop.internal = 10.20.0.11; the workstation has no route to either"

say "2. Without tp, the workstation reaches neither by name nor by address."
try curl --silent --show-error --max-time 2 http://orders.shop.internal/
[ "$code" != 0 ] || fail "the workstation must not reach the service by itself"
try curl --silent --show-error --max-time 2 http://10.20.0.10/
[ "$code" != 0 ] || fail "the workstation must not reach the service by itself"

say "3. A manager inside that network. It lets in the keys that are listed, and shows its own key's hash."
"${user[@]}" tp key new --file "$folder/home/key.pem" > authorized-keys
in_shop "$bin/tp-manager" --standalone --listen 192.0.2.2:8443 --key "$folder/manager.pem" --authorized-keys "$folder/authorized-keys" \
  --suffix shop.internal --range 10.20.0.0/24 >manager.log 2>&1 &
for _ in $(seq 100); do manager_key=$(grep -o 'sha256:[0-9a-f]\{64\}' manager.log | head -1) && break; sleep .05; done
[ -n "${manager_key:-}" ] || { cat manager.log >&2; fail "the manager did not start"; }
echo "  it listens on 192.0.2.2:8443, and its key is $manager_key"

say "4. tp connect: a SOCKS5 and HTTP proxy on loopback, without root."
try tp connect --name demo --listen 127.0.0.1:1080 --via 192.0.2.2:8443 --key "$folder/home/key.pem" --manager-key "$manager_key"
[ "$code" = 0 ] || { cat manager.log >&2; fail "tp connect failed"; }

say "5. The same names, through the proxy: SOCKS5, HTTP, and by address."
try curl --silent --show-error --max-time 5 -x socks5h://127.0.0.1:1080 http://orders.shop.internal/
[ "$out" = "orders: 3 parcels to send" ] || fail "not the answer of the service"
try curl --silent --show-error --max-time 5 -x http://127.0.0.1:1080 http://stock.shop.internal/
[ "$out" = "stock: 12 parcels left" ] || fail "not the answer of the service"
try curl --silent --show-error --max-time 5 -x socks5://127.0.0.1:1080 http://10.20.0.11/
[ "$out" = "stock: 12 parcels left" ] || fail "not the answer of the service"
echo "  and a closed port is refused, not accepted and closed:"
try curl --silent --show-error --max-time 5 -x socks5h://127.0.0.1:1080 http://orders.shop.internal:81/
[ "$code" = 97 ] || fail "a closed port must be a refusal of the proxy (97), not $code"

say "6. tp status shows what an end-to-end probe just saw."
try tp status
[ "$code" = 0 ] || fail "tp status failed"

say "7. tp quit: the way is closed again."
try tp quit
try curl --silent --show-error --max-time 2 -x socks5h://127.0.0.1:1080 http://orders.shop.internal/
[ "$code" != 0 ] || fail "the proxy must be gone"

say "Done in $SECONDS s. Namespaces, processes and files of the demo are gone."
