#!/usr/bin/env bash
# Packs everything that check_on_gpu.sh needs into one file for a machine with a GPU, and prints the command that
# unpacks and runs it there. Needs g++, Rust, xz and, unless --program names a binary that is built, what
# simulator/build.sh needs.
#
#   pack_for_gpu.sh [--program CLEARFORM] [-o FILE]    FILE is target/clearform-gpu.tar.xz by default
set -euo pipefail
LIMIT=$((24 * 1000 * 1000))
root=$(cd "$(dirname "$0")/.." && pwd)
program= file=$root/target/clearform-gpu.tar.xz
while [ $# -gt 0 ]; do
  case $1 in
  --program) program=$(realpath "$2") && shift 2 ;;
  -o) file=$(realpath --canonicalize-missing "$2") && shift 2 ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
  esac
done
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pack=$work/clearform-gpu
mkdir -p "$pack/bin" "$pack/checks"

# Without the demo, which has a model inside.
build_program() {
  local toolkit=$PWD/target/simulated/toolkit
  kernels/simulator/build.sh # the compiler, and libraries to link
  CUDA_HOME=$toolkit CUDA_PATH=$toolkit PATH=$toolkit/bin:$PATH CUDA_COMPUTE_CAP=80 \
    cargo build --release -p clearform-cli --no-default-features --features cuda
  program=$work/clearform
  cp "${CARGO_TARGET_DIR:-target}/release/clearform" "$program" # the next build without CUDA replaces it there
}

add_program() {
  # A script cannot be stripped.
  strip -o "$pack/bin/clearform" "$program" 2>/dev/null || cp "$program" "$pack/bin/clearform"
}

# For any processor with AVX2, and any system with glibc.
add_checks() {
  local name
  for name in check bench picture; do
    g++ -std=c++20 -O2 -march=x86-64-v3 -static-libstdc++ -static-libgcc -s -Wall -Wextra -Wno-unknown-pragmas \
      "kernels/checks/$name.cpp" -o "$pack/bin/$name" -ldl
  done
  cp kernels/check_on_gpu.sh "$pack/"
  cp kernels/checks/lists.txt kernels/checks/peers.py "$pack/checks/"
}

add_kernels() {
  (cd kernels && cp --parents ./*/*.ptx ./*/*.cubin "$pack/")
  # With the features of `cargo test --workspace`, so that little is compiled again.
  cargo build --quiet --workspace --example tile_lists
  "${CARGO_TARGET_DIR:-target}/debug/examples/tile_lists" "$pack/lists"
}

add_models_and_peers() {
  mkdir -p "$pack/mini-flux" "$pack/peers"
  cp -r assets/mini-flux/base "$pack/mini-flux/"
  cp benches/peers/step.py benches/peers/alternation.py "$pack/peers/"
}

print_sizes() {
  (cd "$pack" && du --apparent-size --bytes --max-depth=1 --all . | sort -n)
}

[ -n "$program" ] || build_program
add_program
add_checks
add_kernels
add_models_and_peers
# The window spans the whole file, so that what the program contains too costs nothing; --x86 is for its machine code.
tar c -C "$work" --sort=name --owner=0 --group=0 clearform-gpu |
  xz --x86 --lzma2=preset=9e,dict=128MiB -T2 >"$file"
size=$(stat -c %s "$file")
if [ "$size" -gt "$LIMIT" ]; then
  printf '%s has %s bytes, more than %s; unpacked:\n' "$file" "$size" "$LIMIT" >&2
  print_sizes >&2
  exit 1
fi
printf '%s has %s bytes. On a machine with a GPU:\n\n' "$file" "$size"
printf '  tar xJf %s && clearform-gpu/check_on_gpu.sh\n' "${file##*/}"
