#!/bin/bash
# usage: image.sh   builds the static tp-manager and tp-agent and writes target/image/tp.tar, a docker-archive of lab.local/tp:dev.
# Needs no container tool. STRIP=strip is used when present, since nobody reads symbols inside the image.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

target=x86_64-unknown-linux-gnu
cargo build --release --package tp-manager --package tp-agent --target "$target" \
    --config "target.$target.rustflags=[\"-Ctarget-feature=+crt-static\"]"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for program in tp-manager tp-agent; do
    cp "${CARGO_TARGET_DIR:-target}/$target/release/$program" "$work/$program"
    if command -v "${STRIP:-strip}" >/dev/null; then "${STRIP:-strip}" "$work/$program"; fi
done

mkdir -p target/image
python3 tests/cluster/mkimage.py target/image/tp.tar lab.local/tp:dev \
    --entrypoint '["/tp-manager"]' --user 65532:65532 \
    "$work/tp-manager=/tp-manager" "$work/tp-agent=/tp-agent"
