#!/bin/bash
# usage: fuzz.sh SECONDS [TARGET…]   runs the fuzz targets (all of them) for that much processor time each, after installing
# cargo-fuzz where it is missing. Needs a nightly toolchain; says so and fails where there is none.
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

# Sets `used` to the processor time of the children that have ended, in whole seconds. A subshell would count its own.
clock=$(mktemp); trap 'rm -f "$clock"' EXIT
read_clock() {
  times >"$clock"
  used=$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += t[1] * 60 + t[2] } print int(s) }' "$clock")
}

for target in $targets; do
  # The corpus grows outside the tree; what the tree has is read, never written.
  corpus=$CARGO_TARGET_DIR/corpus/$target; mkdir -p "$corpus"
  seeds=(); [ ! -d "fuzz/corpus/$target" ] || seeds=("fuzz/corpus/$target")
  read_clock; start=$used left=$seconds
  # libFuzzer counts wall time, which on a shared machine is not what was worked: slices until the processor time is reached.
  while [ "$left" -gt 0 ]; do
    echo "fuzzing $target for $left s of processor time"
    mkdir -p "$artifacts/$target"
    "$programs/$target" -artifact_prefix="$artifacts/$target/" -max_total_time="$left" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
      "$corpus" "${seeds[@]}"
    read_clock; left=$((seconds - used + start))
    # The end of a slice costs a second or two of start-up; a rest smaller than that is not worth one.
    [ "$left" -ge 5 ] || left=0
  done
  echo "fuzzed $target: $((used - start)) s of processor time"
done
