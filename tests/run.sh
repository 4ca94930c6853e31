#!/bin/bash
# Every test of the workspace. Those on the cluster mostly wait for it, so what needs none runs beside them, and so do two
# files of them that wait longest, for a lease and for a minute of RBAC's.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
waiting=(temporary rights)

# One selection of packages throughout: another one would mean other features, and other builds of the same crates.
run() { cargo test --locked --workspace --no-fail-fast "$@"; }
run --no-run || exit

logs=$(mktemp -d); trap 'rm -rf "$logs"' EXIT
names=() pids=()
beside() { local name=$1; shift; run "$@" >"$logs/$name" 2>&1 & names+=("$name") pids+=($!); }

on_cluster=() elsewhere=()
shopt -s nullglob
for file in */tests/*.rs */*/tests/*.rs; do
  name=$(basename "$file" .rs)
  if [[ $file != tests/tests/* ]]; then elsewhere+=(--test "$name")
  elif [[ " ${waiting[*]} " = *" $name "* ]]; then beside "$name" --test "$name"
  else on_cluster+=(--test "$name"); fi
done
beside elsewhere --lib --bins "${elsewhere[@]}"
code=0
run "${on_cluster[@]}" || code=$?
run --doc || code=$?
for index in "${!names[@]}"; do
  wait "${pids[$index]}" || code=$?
  cat "$logs/${names[$index]}"
done
exit "$code"
