#!/bin/bash
# usage: fuzz.sh SECONDS   runs every fuzz target that long, after installing cargo-fuzz where it is missing.
# Needs a nightly toolchain; says so and fails where there is none.
set -eu
seconds=$1
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rustup toolchain list 2>/dev/null | grep -q nightly || { echo "error: cargo-fuzz needs a nightly toolchain: rustup toolchain install nightly" >&2; exit 1; }
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
# Its own folder: sanitizers and other flags would rebuild everything.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/tp-target}-fuzz
targets=$(cargo +nightly fuzz list)
[ -n "$targets" ] || { echo "error: no fuzz target in fuzz/" >&2; exit 1; }
for target in $targets; do
  echo "fuzzing $target for $seconds s"
  # The corpus grows outside the tree; what the tree has is read, never written.
  corpus=$CARGO_TARGET_DIR/corpus/$target; mkdir -p "$corpus"
  seeds=(); [ ! -d "fuzz/corpus/$target" ] || seeds=("fuzz/corpus/$target")
  cargo +nightly fuzz run "$target" "$corpus" "${seeds[@]}" -- -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1
done
