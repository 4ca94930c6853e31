#!/bin/bash
# usage: fuzz.sh SECONDS [TARGET…]   runs the fuzz targets (all of them) for that much processor time each, as many at once as
# there are processors, after installing cargo-fuzz where it is missing. Needs a nightly toolchain; fails where there is none.
set -eu
seconds=$1; shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rustup toolchain list 2>/dev/null | grep -q nightly || { echo "error: cargo-fuzz needs a nightly toolchain: rustup toolchain install nightly" >&2; exit 1; }
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
# Its own folder: sanitizers and other flags would rebuild everything.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/tp-target}-fuzz
targets=${*:-$(cargo +nightly fuzz list)}
[ -n "$targets" ] || { echo "error: no fuzz target in fuzz/" >&2; exit 1; }
cargo +nightly fuzz build
programs=$CARGO_TARGET_DIR/$(rustc +nightly -vV | sed -n 's/^host: //p')/release
artifacts=$PWD/fuzz/artifacts
logs=$(mktemp -d); trap 'rm -rf "$logs"' EXIT

# Sets `used` to the processor time of this shell's children that have ended, in whole seconds. A subshell would count its own.
read_clock() {
  times >"$1.clock"
  used=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += t[1] * 60 + t[2] } print int(s) }' "$1.clock")
}

fuzz() {
  local target=$1 left=$seconds corpus=$CARGO_TARGET_DIR/corpus/$1 seeds=()
  # The corpus grows outside the tree; what the tree has is read, never written.
  mkdir -p "$corpus" "$artifacts/$target"
  [ ! -d "fuzz/seeds/$target" ] || seeds=("fuzz/seeds/$target")
  # libFuzzer counts wall time, which on a shared machine is not what was worked: slices until the processor time is reached.
  while [ "$left" -gt 0 ]; do
    echo "fuzzing $target for $left s of processor time"
    "$programs/$target" -artifact_prefix="$artifacts/$target/" -max_total_time="$left" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
      "$corpus" "${seeds[@]}"
    read_clock "$logs/$target"; left=$((seconds - used))
    # The end of a slice costs a second or two of start-up; a rest smaller than that is not worth one.
    [ "$left" -ge 5 ] || left=0
  done
  echo "fuzzed $target: $used s of processor time"
}

failed=()
# Ends one of those that run, in whatever order they end, and prints what it said.
reap() {
  local code=0 ended
  wait -n -p ended || code=$?
  cat "$logs/${running[$ended]}"
  [ "$code" = 0 ] || failed+=("${running[$ended]}")
  unset "running[$ended]"
}
declare -A running=()
for target in $targets; do
  [ ${#running[@]} -lt "$(nproc)" ] || reap
  fuzz "$target" >"$logs/$target" 2>&1 &
  running[$!]=$target
done
while [ ${#running[@]} -gt 0 ]; do reap; done
[ ${#failed[@]} = 0 ] || { echo "error: a finding, or a target that did not run: ${failed[*]}" >&2; exit 1; }
