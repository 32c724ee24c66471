#!/usr/bin/env bash
# Runs clearform, built with CUDA, on the simulated device. Compares forward passes with the CPU's, on compute capability 8.0
# and 9.0, then converts, distills and samples a model of every family. Takes half an hour.
set -euo pipefail
cd "$(dirname "$0")/../.."
kernels/simulator/build.sh
export CLEARFORM_PROGRAM=$PWD/kernels/simulator/clearform.sh
for capability in 80 90; do
  SIMULATOR_CAPABILITY=$capability cargo test --workspace --test device -- --ignored
done
cargo test --workspace --test families
