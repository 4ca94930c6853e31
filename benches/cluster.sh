#!/bin/bash
# C1 to C6 and C8 on the test cluster: prepares the far end, runs the bench in the laptop namespace, removes what it made.
# Needs `make cluster image`; usage: benches/cluster.sh BIN_DIR BENCH_DIR [QUESTION…], the folders of tp and impair and of the benches;
# questions are bulk, connections, round-trips, beside-bulk and intercept: without one, all of them and B18.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cluster=$here/../tests/cluster
. "$cluster/env.sh"
bin_dir=$(realpath "$1") bench=$(realpath "$2") tp=$(realpath "$1")/tp
export KUBECONFIG=$CLUSTER_DIR/kubeconfig
work=$(mktemp -d)
cleanup() { kubectl delete namespace bench --ignore-not-found --wait=false >/dev/null 2>&1 || true; rm -rf "$work"; }
trap cleanup EXIT
if ! kubectl -n tp-system rollout status deployment/tp-manager --timeout=1s >/dev/null 2>&1; then
  "$cluster/load.sh" "$here/../target/image/tp.tar" >/dev/null
  "$tp" install --image lab.local/tp:dev >/dev/null
fi
# Dynamic binary: mkimage copies the libraries it names.
cp "$bench/peer" "$work/peer"
libraries=()
while read -r library; do libraries+=("$library=$library"); done < <(ldd "$work/peer" | grep -o '/[^ ]*' || true)
python3 "$cluster/mkimage.py" "$work/peer.tar" lab.local/bench-peer:dev --entrypoint '["/peer"]' "$work/peer=/peer" "${libraries[@]}" >/dev/null
"$cluster/load.sh" "$work/peer.tar" >/dev/null
kubectl get namespace bench >/dev/null 2>&1 || kubectl create namespace bench >/dev/null
kubectl apply -f - >/dev/null <<'Y'
apiVersion: v1
kind: Pod
metadata: {name: peer, namespace: bench, labels: {app: peer}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: peer, image: "lab.local/bench-peer:dev"}]
---
apiVersion: v1
kind: Service
metadata: {name: peer, namespace: bench}
spec: {selector: {app: peer}, ports: [{name: bench, port: 7000}, {name: server-first, port: 7001}]}
Y
# Pods that no agent has been in, one for each round of `intercept`.
for round in 0 1 2 3 4; do
  kubectl apply -f - >/dev/null <<Y
apiVersion: v1
kind: Pod
metadata: {name: target-$round, namespace: bench, labels: {app: target-$round}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: peer, image: "lab.local/bench-peer:dev", ports: [{containerPort: 7000}]}]
Y
done
kubectl -n bench wait --for=condition=Ready pod --all --timeout=60s >/dev/null
# kube-proxy is a moment behind; a refused port is what the bench would then see.
until inside bash -c "exec 3<>/dev/tcp/$(kubectl -n bench get service peer -o jsonpath={.spec.clusterIP})/7001" 2>/dev/null; do sleep .1; done
TARGETS=$(kubectl -n bench get pods -o jsonpath='{range .items[*]}{.metadata.name}={.status.podIP}{"\n"}{end}' | grep ^target-)
export TARGETS
export TP_BIN=$tp PEER=peer.bench.svc PEER_POD=bench/peer XDG_RUNTIME_DIR=$work
"$cluster/laptop.sh" "$bench/through_cluster" "${@:3}"
[ $# = 2 ] || exit 0

# The same connections over a link of 20 ms round trip: a relay on the laptop's loopback, which the kubeconfig then names.
coproc link { "$cluster/laptop.sh" "$bin_dir/impair" 127.0.0.1:0 "$NODE:$API_PORT" 1; }
read -r _ address <&"${link[0]}"
echo 'delay 10' >&"${link[1]}"; read -r _ <&"${link[0]}"
sed "s|server: \"https://$NODE:$API_PORT\"|server: \"https://$address\", tls-server-name: $NODE|" "$CLUSTER_DIR/kubeconfig-laptop" >"$work/slow"
echo; echo "round trip to the API server: 20 ms"
ip netns exec k8s-laptop env KUBECONFIG="$work/slow" "$bench/through_cluster" connections round-trips

echo; echo "B18: our port-forward pump beside kube's"
PEER_POD=bench/peer "$bench/port_forward"
