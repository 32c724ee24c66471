#!/usr/bin/env bash
# Runs clearform, built for CUDA, on the simulated device: forwards against the CPU, and every family converted, distilled
# and drawn.
set -euo pipefail
cd "$(dirname "$0")/../.."
kernels/simulator/build.sh
export CLEARFORM_PROGRAM=$PWD/kernels/simulator/clearform.sh
cargo test --workspace --test device -- --ignored
cargo test --workspace --test families
