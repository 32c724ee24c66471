#!/usr/bin/env bash
# Runs clearform, built for CUDA, on the simulated device: forwards against the CPU, on one of compute capability 9.0 too,
# and every family converted, distilled and drawn.
set -euo pipefail
cd "$(dirname "$0")/../.."
kernels/simulator/build.sh
export CLEARFORM_PROGRAM=$PWD/kernels/simulator/clearform.sh
for capability in 80 90; do
  SIMULATOR_CAPABILITY=$capability cargo test --workspace --test device -- --ignored
done
cargo test --workspace --test families
