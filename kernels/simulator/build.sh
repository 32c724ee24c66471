#!/usr/bin/env bash
# Builds clearform with CUDA on a machine without a GPU or a CUDA toolkit. The result, target/simulated/clearform, runs
# on the simulated device, and on a GPU if it is copied there. nvcc comes from PyPI (500 MB); the first build takes minutes.
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
# Stub libraries to link against, with NVIDIA's names. At run time, the libraries of the simulated device (run.sh) or those of
# a GPU's driver and toolkit take their place.
kernels/simulator/run.sh true
functions=$(nm --dynamic --defined-only target/simulator-build/debug/libsimulator.so | awk '{ print $3 }')
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
cargo clippy -p clearform-cli --features cuda -- -D warnings # the only place where code of this feature is linted
cargo build -p clearform-cli --no-default-features --features cuda # the demo has a model inside
cp "${CARGO_TARGET_DIR:-target}/debug/clearform" target/simulated/ # the next build without CUDA replaces it there
