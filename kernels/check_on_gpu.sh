#!/usr/bin/env bash
# On a machine with an NVIDIA GPU of compute capability 8.0 or newer, driver 550 or newer, and g++: every kernel against
# its plain reference on the device, under compute-sanitizer too where it is installed, then the table of times.
set -euo pipefail
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
