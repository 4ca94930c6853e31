#!/bin/bash
# Says whether the cluster answers; exit code 1 when it does not.
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ -e "$CLUSTER_DIR/kubeconfig" ] || { echo down; exit 1; }
export KUBECONFIG=$CLUSTER_DIR/kubeconfig
if kubectl get --raw /readyz --request-timeout=3s >/dev/null 2>&1; then echo up; else echo down; exit 1; fi
