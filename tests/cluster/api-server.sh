#!/bin/bash
# The API server of a cluster that is up, as one process: `start`, or `kill` as a power cut would.
set -eu
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
case ${1:-} in
  kill) # nsenter waits for it, as its parent in the outer PID namespace
    entered=$(cat "$RUN/api-server.pid"); kill -9 $(cat "/proc/$entered/task/$entered/children") ;;
  start)
    setsid nohup nsenter -t "$(holder)" -m -n -u -p "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --advertise-address=$NODE_IP --bind-address=0.0.0.0 --secure-port=$API_PORT \
      --tls-cert-file="$CRT/apiserver.crt" --tls-private-key-file="$CRT/apiserver.key" --client-ca-file="$CRT/ca.crt" \
      --kubelet-client-certificate="$CRT/apiserver-kubelet-client.crt" --kubelet-client-key="$CRT/apiserver-kubelet-client.key" --kubelet-certificate-authority="$CRT/ca.crt" --kubelet-preferred-address-types=InternalIP \
      --service-account-issuer=https://kubernetes.default.svc.cluster.local --service-account-key-file="$CRT/sa.pub" --service-account-signing-key-file="$CRT/sa.key" \
      --requestheader-client-ca-file="$CRT/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group --requestheader-username-headers=X-Remote-User \
      --proxy-client-cert-file="$CRT/front-proxy-client.crt" --proxy-client-key-file="$CRT/front-proxy-client.key" \
      --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --service-cluster-ip-range=$SERVICE_CIDR --allow-privileged=true --profiling=false >>"$LOG/kube-apiserver.log" 2>&1 &
    echo $! > "$RUN/api-server.pid" ;;
  *) echo "usage: api-server.sh start|kill" >&2; exit 2 ;;
esac
