#!/usr/bin/env bash
# Runs a program over the simulated device: `run.sh COMMAND ARGUMENT...`. SIMULATOR_REPORT=FILE leaves there how often each
# kernel was launched and how much was copied.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
cargo build --quiet --manifest-path "$root/Cargo.toml" -p clearform-simulator
libraries=$root/target/simulator
mkdir -p "$libraries"
for name in libcuda.so.1 libcublas.so.13 libcurand.so.10; do
  ln -sf ../debug/libsimulator.so "$libraries/$name"
done
LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$@"
