#!/bin/bash
# Every test of the workspace. Two files mostly wait, for a lease and for a minute of RBAC's, so they run beside the others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
waiting=(temporary rights) pids=()

# One selection of packages throughout: another one would mean other features, and other builds of the same crates.
run() { cargo test --locked --workspace --no-fail-fast "$@"; }
run --no-run || exit

logs=$(mktemp -d); trap 'rm -rf "$logs"' EXIT
for file in "${waiting[@]}"; do run --test "$file" >"$logs/$file" 2>&1 & pids+=($!); done

others=()
shopt -s nullglob
for file in */tests/*.rs */*/tests/*.rs; do
  name=$(basename "$file" .rs)
  [[ " ${waiting[*]} " = *" $name "* ]] || others+=(--test "$name")
done
code=0
run --lib --bins "${others[@]}" || code=$?
run --doc || code=$?
for index in "${!waiting[@]}"; do
  wait "${pids[$index]}" || code=$?
  cat "$logs/${waiting[$index]}"
done
exit "$code"
