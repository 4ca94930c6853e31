#!/bin/bash
# The same story on the real cluster of tests/cluster: `make demo-cluster` builds and starts it and runs this.
# tp runs as an unprivileged user in the "laptop" namespace, which reaches the API server and no pod.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=${TP_BIN_DIR:?"run this as: make demo-cluster"}
[ "$(id -u)" = 0 ] || { echo "error: the laptop is a network namespace, and only root can enter it" >&2; exit 1; }
. "$here/tests/cluster/env.sh"
export KUBECONFIG=$CLUSTER_DIR/kubeconfig
uid=19999
folder=$(mktemp -d /tmp/tp-demo-XXXXXX)
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() { echo "error: $*" >&2; exit 1; }

mkdir -m 700 "$folder/home" "$folder/run"; install -m 755 "$bin/tp" "$folder/tp"; install -m 600 "$CLUSTER_DIR/kubeconfig-laptop" "$folder/home/kubeconfig"
chmod 711 "$folder"; chown -R $uid:$uid "$folder/home" "$folder/run"
user=(ip netns exec k8s-laptop setpriv --reuid $uid --regid $uid --clear-groups -- env -i HOME="$folder/home" XDG_RUNTIME_DIR="$folder/run"
  KUBECONFIG="$folder/home/kubeconfig" PATH="$folder:/usr/local/bin:/usr/bin:/bin" LANG=C.UTF-8 TERM="${TERM:-dumb}")
try() { printf '$ %s\n' "$*"; out=$("${user[@]}" "$@" 2>&1) && code=0 || code=$?; [ -z "$out" ] || printf '%s\n' "$out" | sed 's/^/  /'; }

had_manager=yes; kubectl get namespace tp-system >/dev/null 2>&1 || had_manager=no
had_demo=yes; kubectl get namespace demo >/dev/null 2>&1 || had_demo=no
program=
finish() {
  [ -z "$program" ] || kill "$program" 2>/dev/null || true
  "${user[@]}" tp quit --all >/dev/null 2>&1 || true
  [ "$had_manager" = yes ] || "${user[@]}" tp uninstall --everything >/dev/null 2>&1 || true
  [ "$had_demo" = yes ] || kubectl delete namespace demo --wait=false >/dev/null 2>&1 || true
  rm -rf "$folder"
}
trap finish EXIT

say "1. A cluster with a workload: Service echo in namespace demo."
kubectl apply -f "$here/tests/cluster/manifests/demo.yaml" >/dev/null
kubectl -n demo rollout status deploy/echo --timeout=60s | sed 's/^/  /'
"$here/tests/cluster/load.sh" "$here/target/image/tp.tar" >/dev/null
# Ready pods are in the node's packet rules a moment later.
service=$(kubectl -n demo get service echo -o jsonpath='{.spec.clusterIP}')
for _ in {1..100}; do
  if inside bash -c "exec 3<>/dev/tcp/$service/80" 2>/dev/null; then break; fi
  sleep .1
done
pod=$(kubectl -n demo get pod -l app=echo -o jsonpath='{.items[0].status.podIP}')
cd "$folder/home"

say "2. Without tp, the laptop reaches neither the Service nor a pod."
try curl --silent --show-error --max-time 2 http://echo.demo/hostname
[ "$code" != 0 ] || fail "the laptop must not reach the Service by itself"
try curl --silent --show-error --max-time 2 "http://$pod:8080/hostname"
[ "$code" != 0 ] || fail "the laptop must not reach the pod by itself"

say "3. An administrator installs the manager, once."
if [ "$had_manager" = yes ]; then echo "  it is installed already"; else
  try tp install --image lab.local/tp:dev --replicas 2
  [ "$code" = 0 ] || fail "tp install failed"
fi

say "4. A developer connects, as uid $uid, with a kubeconfig and nothing else."
try id -u
[ "$out" = $uid ] || fail "this must not run as root"
try tp connect --proxy --namespace demo --listen 127.0.0.1:1080
[ "$code" = 0 ] || fail "tp connect failed"

say "5. Names and addresses of the cluster, in any program that knows a proxy."
for url in http://echo/hostname http://echo.demo.svc.cluster.local/hostname "http://$pod:8080/hostname"; do
  try curl --silent --show-error --max-time 5 -x socks5h://127.0.0.1:1080 "$url"
  [[ $out == echo-* ]] || fail "not the answer of the Service"
done
try curl --silent --show-error --max-time 5 -x http://127.0.0.1:1080 http://echo-headless.demo.svc:8080/hostname
[[ $out == echo-* ]] || fail "not the answer of the headless Service"

say "6. tp status shows what an end-to-end probe just saw."
try tp status

say "7. A personal intercept: requests with one header reach a program on the laptop, all others the pods."
mkdir "$folder/www"; echo 'hello from the laptop' >"$folder/www/hostname"; chmod -R a+rX "$folder/www"
"${user[@]}" python3 -m http.server --directory "$folder/www" --bind 127.0.0.1 3000 >/dev/null 2>&1 & program=$!
"${user[@]}" timeout 5 bash -c 'until (exec 3<>/dev/tcp/127.0.0.1/3000) 2>/dev/null; do sleep 0.05; done' || fail "the program does not listen"
try tp intercept echo -p 3000:http --http-header x-user=ada
[ "$code" = 0 ] || fail "tp intercept failed"
try tp curl --silent --show-error --max-time 5 -H 'x-user: ada' http://echo/hostname
[ "$out" = 'hello from the laptop' ] || fail "the header must lead to the laptop"
try tp curl --silent --show-error --max-time 5 http://echo/hostname
[[ $out == echo-* ]] || fail "everybody else's requests stay with the pods"
try tp explain -H 'x-user: ada' http://echo/hostname
kill "$program"; wait "$program" 2>/dev/null || true; program=
try tp curl --silent --show-error --max-time 5 --dump-header - --output /dev/null -H 'x-user: ada' http://echo/hostname
grep -qi '^x-tp-fallback: 1' <<<"$out" || fail "a program that is not there must leave the request to the pods"
try tp leave echo

say "8. tp quit: the way is closed again."
try tp quit
try curl --silent --show-error --max-time 2 -x socks5h://127.0.0.1:1080 http://echo/hostname
[ "$code" != 0 ] || fail "the proxy must be gone"
say "Done in $SECONDS s."
