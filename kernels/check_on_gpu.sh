#!/usr/bin/env bash
# Checks and times the kernels on an NVIDIA GPU of compute capability 8.0 or newer, with driver 550 or newer and g++: every
# kernel against its reference, a table of times, and compute-sanitizer if it is installed. A part that fails does not stop
# the others; failures are listed at the end.
#
#   check_on_gpu.sh [--only kernels|sanitizer|program|peers] [CLEARFORM [PYTHON]]
#
# With a clearform that was built with --features cuda (which needs driver 580), it also generates, distills and compares on
# the GPU. With a Python that has torch, it also times the peers: attention and, with diffusers, whole steps of FLUX's shape
# with random weights, from 1K to 8K. cuBLAS, cuRAND and the CUDA runtime may be those that came with torch.
set -uo pipefail
only=
[ "${1-}" != --only ] || { only=$2; shift 2; }
clearform=${1:+$(realpath "$1")} python=${2:-}
case $only,$clearform,$python in
,* | kernels,* | sanitizer,* | program,?*,* | peers,?*,?*) ;;
*) printf -- '--only %s: unknown part, or it needs CLEARFORM or PYTHON\n' "$only" >&2; exit 2 ;;
esac
kernels=$(cd "$(dirname "$0")" && pwd)
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
failed=()

if [ -n "$python" ]; then
  torch_libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
  libraries=$(find "$torch_libraries" -regex '.*/lib\(cublas\|curand\|cudart\)\.so\..*' -printf '%h:' 2>/dev/null)
  [ -z "$libraries" ] || export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}${libraries%:}
fi

part() {
  printf '\n== %s (%ss)\n' "$*" "$SECONDS"
  "$@" || failed+=("$*")
}

wanted() {
  [ -z "$only" ] || [ "$only" = "$1" ]
}

compiled() {
  g++ -std=c++20 -O2 -march=native -Wall -Wextra -Wno-unknown-pragmas "$1" -o "$built/$(basename "$1" .cpp)" -ldl
}

sanitized() {
  compute-sanitizer --tool "$1" --error-exitcode 1 "$built/check" others >"$built/log" || { tail -50 "$built/log"; return 1; }
}

check_kernels() {
  part "$built/check" others
  part "$built/check" narrow
  part compiled bench.cpp
  part "$built/bench"
}

check_memory() {
  command -v compute-sanitizer >/dev/null || { printf 'compute-sanitizer is not installed\n'; return; }
  part sanitized memcheck
  part sanitized racecheck
}

check_program() {
  local base=$kernels/../assets/mini-flux/base gpu=(--device cuda:0)
  part "$clearform" generate "$base" "a red apple" --seed 1 -o "$built/apple.png" "${gpu[@]}"
  part "$clearform" convert "$base" -o "$built/model" --radius 4 --steps 20 --batch 4 --sample-count 8 "${gpu[@]}"
  part "$clearform" verify "$built/model"
  part "$clearform" compare "$base" "$built/model" -o "$built/report" --steps 10 "${gpu[@]}"
}

pushd "$kernels/checks" >/dev/null
if wanted kernels || wanted sanitizer; then part compiled check.cpp; fi
if wanted kernels; then check_kernels; fi
if wanted sanitizer; then check_memory; fi
popd >/dev/null
if wanted program && [ -n "$clearform" ]; then check_program; fi
if wanted peers && [ -n "$python" ]; then part "$python" "$kernels/../benches/peers/tables.py" "$clearform" --device cuda:0; fi

[ ${#failed[@]} -eq 0 ] || { printf '\nfailed: %s\n' "${failed[@]}"; exit 1; }
printf '\nall passed (%ss)\n' "$SECONDS"
