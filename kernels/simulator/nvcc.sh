#!/usr/bin/env bash
# The nvcc that candle's build calls. PTX is compiled by NVIDIA's compiler. The static library for quantized models, which
# would take most of the build and which clearform never calls, gets functions that abort instead.
set -euo pipefail
if [[ " $* " != *" -c "* ]]; then
  exec "$(dirname "$0")/../wheels/nvidia/cu13/bin/nvcc" "$@"
fi
source=${!#}
while [ "$1" != -o ]; do shift; done
{
  echo '#include <stdlib.h>'
  if [ "$(basename "$source")" = moe_gguf.cu ]; then
    sed -nE 's/.*pub fn (\w+).*/void \1(void) { abort(); }/p' "$(dirname "$source")/../ffi.rs"
  fi
} | gcc -x c -c -fPIC -o "$2" -
