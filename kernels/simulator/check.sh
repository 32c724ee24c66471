#!/usr/bin/env bash
# The checks that `check_on_gpu.sh` makes on a device, on a simulated one of compute capability 8.0 and one of 9.0: the
# committed PTX against its plain reference.
set -euo pipefail
cd "$(dirname "$0")/../emulation"
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
g++ -std=c++20 -O1 -march=native -DON_GPU -Wall -Wextra -Wno-unknown-pragmas check.cpp -o "$built/check" -ldl
for capability in 80 90; do
  for half in others narrow; do
    SIMULATOR_CAPABILITY=$capability ../simulator/run.sh "$built/check" "$half"
  done
done
