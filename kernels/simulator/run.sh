#!/usr/bin/env bash
# Runs a program on the simulated device: `run.sh COMMAND ARGUMENT...`. With SIMULATOR_REPORT=FILE, the number of launches
# of each kernel and of bytes copied is written there at exit; the other variables are documented in src/lib.rs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$here/../../target
cargo build --quiet --manifest-path "$here/Cargo.toml" --target-dir "$target/simulator-build"
libraries=$target/simulator
mkdir -p "$libraries"
for name in libcuda.so.1 libcublas.so.13 libcurand.so.10; do
  ln -sf ../simulator-build/debug/libsimulator.so "$libraries/$name"
done
LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$@"
