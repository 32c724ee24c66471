#!/usr/bin/env bash
# Checks the committed PTX of every kernel against its reference, on a simulated device of compute capability 8.0 and on one
# of 9.0: the same checks as those of check_on_gpu.sh. Needs g++ and Rust; without 10 GB of memory `large` fails.
set -euo pipefail
cd "$(dirname "$0")/../checks"
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
g++ -std=c++20 -O1 -march=native -Wall -Wextra -Wno-unknown-pragmas check.cpp -o "$built/check" -ldl
export SIMULATOR_PEDANTIC=1
for capability in 80 90; do
  for part in others narrow large; do
    SIMULATOR_CAPABILITY=$capability ../simulator/run.sh "$built/check" "$part"
  done
done
