#!/usr/bin/env bash
# Builds clearform for CUDA on a machine without a GPU or a toolkit: target/simulated/debug/clearform, which runs on the
# simulated device and, carried there, on a GPU. Its compiler comes from PyPI, 500 MB; the first build takes some minutes.
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
# Libraries to link with: NVIDIA's names, and functions that do nothing. At run time whatever bears these names takes their
# place: the simulated device (run.sh), or a GPU's own.
kernels/simulator/run.sh true
functions=$(nm --dynamic --defined-only target/debug/libsimulator.so | awk '{ print $3 }')
library() { # NAME VERSION FUNCTIONS
  grep -E "^$3" <<<"$functions" | sed 's/.*/void &(void) {}/' |
    gcc -shared -x c -Wno-builtin-declaration-mismatch -Wl,-soname,"lib$1.so.$2" -o "$toolkit/lib64/lib$1.so" -
}
library cuda 1 'cu[A-Z]'
library cublas 13 cublas
library curand 10 curand
for unused in cublasLt cudart nvrtc; do
  gcc -shared -x c -o "$toolkit/lib64/lib$unused.so" /dev/null
done
export CUDA_HOME=$toolkit CUDA_PATH=$toolkit PATH=$toolkit/bin:$PATH CUDA_COMPUTE_CAP=80
export CARGO_TARGET_DIR=$PWD/target/simulated
cargo clippy -p clearform-cli --features cuda -- -D warnings # the one place where that code is linted
cargo build -p clearform-cli --features cuda
