#!/usr/bin/env bash
# Packs what check_on_gpu.sh needs, unpacks it elsewhere and runs it on a simulated device of compute capability 9.0
# without timings. Then shows that the run ends with advice where a step fails. Takes some minutes.
#
#   check_pack.sh [CLEARFORM]    default: the binary of build.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pack=$work/clearform-gpu
export SIMULATOR_CAPABILITY=90 SIMULATOR_PEDANTIC=1 OUT=$work

run() {
  kernels/simulator/run.sh "$pack/check_on_gpu.sh" --simulated "$@"
}

fails_with() { # ADVICE STEP
  local status=0
  run --from "$2" >"$work/log" 2>&1 || status=$?
  if [ "$status" = 1 ] && grep -q "^advice: $1" "$work/log" && grep -q 'FAILED' "$work/gpu-table.md"; then return; fi
  tail -40 "$work/log"
  printf 'check_on_gpu.sh --from %s: exit code %s, or without the advice "%s"\n' "$2" "$status" "$1" >&2
  exit 1
}

kernels/pack_for_gpu.sh --program "${1:-target/simulated/clearform}" -o "$work/clearform-gpu.tar.xz"
tar xJf "$work/clearform-gpu.tar.xz" -C "$work"
run
if grep FAILED "$work/gpu-table.md"; then exit 1; fi

# The first entry with another mask than the first one gets that.
cp "$pack/lists/64x64-r16.txt" "$work/lists.txt"
awk '$3 > 0 && NF == 3 && !done { $3 = 0; done = 1 } { print }' "$work/lists.txt" >"$pack/lists/64x64-r16.txt"
fails_with 'the lists do not describe the window' 5
cp "$work/lists.txt" "$pack/lists/64x64-r16.txt"

# The leading byte offset of the values' second half, 8192 / 16 in a descriptor, becomes 4096 / 16.
ptx=$pack/clear_attention/forward_sm90a.ptx
cp "$ptx" "$work/right.ptx"
sed 's/4611686293338849280/4611686293322072064/' "$work/right.ptx" >"$ptx"
if cmp -s "$ptx" "$work/right.ptx"; then printf '%s: the constant is another one now\n' "$ptx" >&2 && exit 1; fi
fails_with 'wrong values' 2
grep -q 'blocks of 64 columns: 0 [1-9]' "$work/log"
printf 'the pack runs, and ends with advice where a step fails\n'
