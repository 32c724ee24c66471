#!/usr/bin/env bash
# Builds clearform for CUDA on a machine without a GPU or a toolkit: target/simulated/debug/clearform, linked with the
# simulated device. Its compiler comes from PyPI, 500 MB; the first build takes some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
toolkit=$PWD/target/simulated/toolkit
if [ ! -d "$toolkit/wheels" ]; then
  python3 -m pip install --quiet --no-deps --target "$toolkit/wheels" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96
fi
cuda=$toolkit/wheels/nvidia/cu13
mkdir -p "$toolkit/bin" "$toolkit/lib64"
cp kernels/simulator/nvcc.sh "$toolkit/bin/nvcc"
ln -sfn "$cuda/include" "$toolkit/include"
cargo build --quiet -p clearform-simulator
for library in cuda cublas cublasLt curand cudart nvrtc; do
  ln -sfn ../../../debug/libsimulator.so "$toolkit/lib64/lib$library.so"
done
export CUDA_HOME=$toolkit CUDA_PATH=$toolkit PATH=$toolkit/bin:$PATH CUDA_COMPUTE_CAP=80
export CARGO_TARGET_DIR=$PWD/target/simulated
cargo clippy -p clearform-cli --features cuda -- -D warnings # the one place where that code is linted
cargo build -p clearform-cli --features cuda
