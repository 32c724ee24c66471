#!/usr/bin/env bash
# The compiler that the tensor library's build calls: PTX comes from NVIDIA's own, but what it would link for quantised
# models, most of the work and nothing that clearform calls, are functions that abort.
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
