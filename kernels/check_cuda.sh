#!/usr/bin/env bash
# Checks the Rust code of the feature `cuda` on a machine without a CUDA toolkit. The tensor library's build calls nvcc;
# a check of types needs nothing of what that makes, so here a stand-in writes empty files in its place.
set -euo pipefail
cd "$(dirname "$0")/.."
toolkit=$PWD/target/no-cuda
mkdir -p "$toolkit/bin" "$toolkit/include" "$toolkit/lib64"
cat >"$toolkit/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
case "$*" in
*--version*) printf '\n\n\nCuda compilation tools, release 13.0, V13.0.88\n' ;;
*--list-gpu-code*) echo sm_80 ;;
*) while [ $# -gt 0 ]; do
  case "$1" in
  -o) shift && : >"$1" ;;
  --output-directory) shift && folder=$1 ;;
  *.cu) [ -z "${folder-}" ] || : >"$folder/$(basename "$1" .cu).ptx" ;;
  esac
  shift
done ;;
esac
NVCC
chmod +x "$toolkit/bin/nvcc"
export CUDA_HOME=$toolkit CUDA_PATH=$toolkit PATH=$toolkit/bin:$PATH CUDA_COMPUTE_CAP=80
# A folder of its own: what the stand-in made must never be linked.
export CARGO_TARGET_DIR=$PWD/target/no-cuda/target
cargo clippy -p clearform-cli --features cuda -- -D warnings
