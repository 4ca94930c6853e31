#!/bin/bash
# usage: image.sh BIN_DIR   packs the static tp-manager and tp-agent of that folder as target/image/tp.tar, a docker-archive of
# lab.local/tp:dev. Needs no container tool. STRIP=strip is used when present, since nobody reads symbols inside the image.
# It builds nothing: a selection of packages of its own would mean other features, and a second build of most crates.
set -euo pipefail
bin_dir="$(realpath "$1")"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for program in tp-manager tp-agent; do
    cp "$bin_dir/$program" "$work/$program"
    if command -v "${STRIP:-strip}" >/dev/null; then "${STRIP:-strip}" "$work/$program"; fi
done

mkdir -p target/image
python3 tests/cluster/mkimage.py target/image/tp.tar lab.local/tp:dev \
    --entrypoint '["/tp-manager"]' --user 65532:65532 \
    "$work/tp-manager=/tp-manager" "$work/tp-agent=/tp-agent"
