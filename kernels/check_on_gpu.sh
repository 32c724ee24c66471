#!/usr/bin/env bash
# On a machine with an NVIDIA GPU of compute capability 8.0 or newer, driver 550 or newer, and g++: every kernel against
# its plain reference on the device, under compute-sanitizer too where it is installed, then the table of times.
#
#   check_on_gpu.sh [CLEARFORM [PYTHON]]
#
# With a clearform that was built with --features cuda, and a Python that has torch and diffusers, the peers too:
# attention, and whole steps of FLUX's shape with random weights, from 1K to 8K.
set -euo pipefail
clearform=${1:+$(realpath "$1")} python=${2:-python3}
cd "$(dirname "$0")/emulation"
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT

flags=(-std=c++20 -O2 -march=native -DON_GPU -Wall -Wextra -Wno-unknown-pragmas)
g++ "${flags[@]}" check.cpp -o "$built/check" -ldl
g++ "${flags[@]}" ../on_gpu/bench.cpp -o "$built/bench" -ldl

for half in others narrow; do
  "$built/check" "$half"
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$built/check" others >/dev/null
    echo "compute-sanitizer $tool: nothing found"
  done
fi
"$built/bench"

[ -n "$clearform" ] || exit 0
"$python" ../../benches/peers/tables.py "$clearform" --device cuda:0
