#!/usr/bin/env bash
# Checks and times clearform on an NVIDIA GPU of compute capability 8.0 or newer within ten minutes: what is most likely
# to fail comes first, and a failing check ends the run with advice. Every check and figure goes into one table of
# Markdown, $OUT/gpu-table.md, or gpu-table.md in the working directory.
#
#   check_on_gpu.sh [--simulated] [--from STEP] [CLEARFORM [PYTHON]]
#
#   1 device      driver and clocks; copies within its memory; products by cuBLAS
#   2 tiny        the smallest calls of attention one by one, by machine code and by PTX
#   3 checks      every kernel; offsets above 2^31; one larger call many times with equal bits
#   4 sanitizer   compute-sanitizer over the smallest calls
#   5 timings     attention over the product's lists, with and without masks; PyTorch's SDPA and FlexAttention
#   6 counters    the profiler's for the attention kernels
#   7 program     mini-flux's picture beside the CPU's; a conversion; steps of FLUX's shape, with their peak memory
#   8 peers       the same steps by diffusers
#
# Runs from the folder that pack_for_gpu.sh packs, where everything is built, or from the source tree, where it needs
# g++, cargo for the lists, and CLEARFORM, built for CUDA, for steps 7 and 8. What is not installed is skipped. PYTHON,
# if it has torch and diffusers, is for the peers. --simulated, for simulator/run.sh, leaves out timings, sanitizer,
# counters and peers.
set -euo pipefail
PATH=$PATH:/usr/local/cuda/bin # compute-sanitizer and ncu
kernels=$(cd "$(dirname "$0")" && pwd)
simulated= first=1
while [[ ${1-} == --* ]]; do
  case $1 in
  --simulated) simulated=yes && shift ;;
  --from) first=$2 && shift 2 ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
  esac
done
work=$(mktemp -d)
table=${OUT:-.}/gpu-table.md
rows=$work/rows
step=
failed=()
not_run=() # for lack of time or memory
touch "$rows"

# --- The table

row() { # WHAT RESULT
  printf '| %s | %s | %s |\n' "$step" "$1" "$2" >>"$rows"
}

skip() { # WHAT WHY
  printf '%s: %s: skipped\n' "$1" "$2"
  row "$1" "$2: skipped"
}

finish() {
  printf '| step | what | result |\n|---|---|---|\n' | cat - "$rows" | tee "$table"
  printf '\n%s seconds; the table is in %s\n' "$SECONDS" "$table"
  rm -rf "$work"
}
trap finish EXIT

begin() { # NUMBER NAME; whether the step is wanted
  step=$2
  ((first <= $1)) || return 1
  printf '\n== %s %s (%ss)\n' "$1" "$2" "$SECONDS"
}

# --- Running things within their time

# Seconds for something that may take $1: no more than are left of ten minutes. A simulated device gets many times as
# long.
seconds() {
  local left=$((590 - SECONDS))
  if [ -n "$simulated" ]; then printf '%s' $(($1 * 12)); else printf '%s' $((left < 1 ? 1 : left < $1 ? left : $1)); fi
}

limited() { # SECONDS COMMAND...; prints what it prints, also to $work/log
  local allowed
  allowed=$(seconds "$1") && shift
  timeout --kill-after 2 "$allowed" "$@" 2>&1 | tee "$work/log"
}

has_time() { # WHAT
  if [ -n "$simulated" ] || ((SECONDS < 580)); then return 0; fi
  : >"$work/log"
  skip "$1" "ten minutes are over"
  not_run+=("$1")
  return 1
}

# A check, which ends the run where it fails.
check() { # WHAT SECONDS COMMAND...
  has_time "$1" || return 0
  local what=$1 begun=$SECONDS status=0
  limited "${@:2}" || status=$?
  case $status in
  0) row "$what" "passed ($((SECONDS - begun)) s)" ;;
  77) skip "$what" "$(grep skipped "$work/log" | tail -1)" && not_run+=("$what") ;; # it lacks memory
  *) stop "$what" "$status" ;;
  esac
}

# A measurement, after which the run goes on.
measure() { # WHAT SECONDS COMMAND...
  has_time "$1" || return 1
  local status=0
  limited "${@:2}" || status=$?
  [ "$status" != 0 ] || return 0
  failed+=("$1")
  row "$1" "FAILED (exit code $status)"
  return 1
}

stop() { # WHAT STATUS
  row "$1" "FAILED (exit code $2); the run ended here"
  printf '\nFAILED: %s, exit code %s\n' "$1" "$2" >&2
  advise "$2" "$work/log" >&2
  exit 1
}

# --- Advice

advise() { # STATUS LOG
  local status=$1 log=$work/advised advice
  grep -v '^module: ' "$2" >"$log" || true # what was loaded instead of a cubin is no fault
  if [ -z "$simulated" ] && ((SECONDS >= 588)); then
    advice="ten minutes are over; --from begins with a later step."
  elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
    advice="it hangs, in what the last line began (or, at 137, memory ran out). In forward_sm90a that is a deadlock of the
  ring: a phase that is never completed, so look at the counts of its barriers, the bytes they expect, and the order of visits."
  elif grep -q 'written out of bounds' "$log"; then
    advice="a kernel writes where it must not. compute-sanitizer names the instruction: $0 --from 4"
  elif grep -Eq 'UNSUPPORTED_PTX|error 222' "$log"; then
    advice="the driver is older than what the program was built with: CUDA 13 needs driver 580."
  elif grep -Eq 'values are wrong|: lse$' "$log"; then
    advice="wrong values; the counts above say where. If they are spread evenly over a tile, look at its mask and at the
  stages of the ring."
  elif grep -Eq 'other bits|order of warps' "$log"; then
    advice="runs differ, so something reads before it may: run compute-sanitizer --tool racecheck, and look at the waits
  for products and copies."
  elif grep -Eq 'lists by|of lists|pair visits|lists cannot|pairs do not' "$log"; then
    advice="the lists do not describe the window: write them again with the example tile_lists, and run the tests of
  clearform-kernels."
  elif grep -Eq 'cuModule|no module has' "$log"; then
    advice="the driver does not load a module. 550 is the oldest that reads this PTX; if it is newer, ptxas of a toolkit
  says what is wrong with it."
  elif grep -q 'libcuda' "$log"; then
    advice="there is no driver, or the container was started without the GPU: nvidia-smi must work first."
  elif grep -q ': error [0-9]' "$log"; then
    advice="the driver reports a fault of a launch (700 illegal address, 715 illegal instruction, 716 misaligned
  address, 719 another one). compute-sanitizer names the instruction: $0 --from 4"
  else
    advice="none is prepared for this; the lines above are all that is known."
  fi
  printf 'advice: %s\n' "$advice"
}

# If it was the cubin that failed, whether the same case passes by PTX tells where the fault lies.
stop_tiny() { # CASE STATUS
  if ! grep -q '^module: .*\.cubin' "$work/log"; then stop "$1" "$2"; fi
  cp "$work/log" "$work/by-cubin"
  printf '\n%s failed; the same by PTX:\n' "$1"
  export CHECK_MODULE=ptx CLEARFORM_PTX=yes # from here on, for the program too
  if limited 15 "$tools/check" tiny "$1"; then
    failed+=("$1, by cubin")
    row "$1, by cubin" "FAILED (exit code $2); the run goes on with the PTX"
    row "$1, by PTX" "passed"
    printf '\nadvice: the cubin fails and the PTX passes, so compilers differ: compare the machine code that the driver\n' >&2
    printf '  makes of the PTX with the cubin. CLEARFORM_PTX=yes makes clearform load the PTX.\n' >&2
    return
  fi
  row "$1, by PTX" "FAILED"
  printf '\nadvice: the PTX fails too, so the fault is in the source, or in what it assumes of the device.\n' >&2
  mv "$work/by-cubin" "$work/log"
  stop "$1" "$2"
}

# --- What the steps need

compile() { # NAME
  g++ -std=c++20 -O2 -march=native -Wall -Wextra -Wno-unknown-pragmas "$kernels/checks/$1.cpp" -o "$tools/$1" -ldl
}

prepare_packed() {
  tools=$kernels/bin lists=$kernels/lists model=$kernels/mini-flux/base peers=$kernels/peers
  clearform=${1:-$kernels/bin/clearform}
}

prepare_tree() {
  tools=$work/bin lists=$work/lists model=$kernels/../assets/mini-flux/base peers=$kernels/../benches/peers
  clearform=${1-}
  mkdir "$tools"
  local name
  for name in check bench picture; do compile "$name"; done
  (cd "$kernels/.." && cargo build --quiet --workspace --example tile_lists &&
    "${CARGO_TARGET_DIR:-target}/debug/examples/tile_lists" "$lists") || printf 'the lists cannot be made: is there a cargo?\n'
}

has_module() { # MODULE
  timeout 60 "$python" -c "import $1" >/dev/null 2>&1
}

# cuBLAS and cuRAND may be those that came with torch, or with a toolkit.
find_libraries() {
  local folders=/usr/local/cuda/lib64 sites site
  sites=$("$python" -c 'import site; print(*site.getsitepackages(), site.getusersitepackages(), sep="\n")' 2>/dev/null) || true
  while read -r site; do
    if [ -d "$site/nvidia" ]; then
      folders+=$(find "$site/nvidia" -regex '.*/lib\(cublas\|curand\|cudart\)\.so\..*' -printf ':%h')
    fi
  done <<<"$sites"
  export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folders
}

export CHECK_KERNELS=$kernels
python=${2:-python3}
if [ -x "$kernels/bin/check" ]; then prepare_packed "$@"; else prepare_tree "$@"; fi
find_libraries

# --- The steps

step_device() {
  if command -v nvidia-smi >/dev/null; then
    row "name, driver, clocks now, power limit" "$(nvidia-smi --id=0 --format=csv,noheader \
      --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit)"
  else
    skip nvidia-smi "not installed"
  fi
  check "the device is there" 30 "$tools/bench" device ${simulated:+--no-timings}
  row "what the kernels run on" "$(sed -n 's/^device: //p' "$work/log")"
  awk -F ' *[|] *' '$3 + 0 > 0 { print "| device | " $2 " | " $3 " ms, " $4 " |" }' "$work/log" >>"$rows"
}

step_tiny() {
  local name status names fell_back=
  names=$("$tools/check" tiny list)
  for name in $names; do
    status=0
    limited 15 "$tools/check" tiny "$name" || status=$?
    if [ "$status" != 0 ]; then
      stop_tiny "$name" "$status"
      fell_back=yes
      continue
    fi
    if grep -q '^module: .*\.ptx' "$work/log"; then fell_back=yes; fi
    row "$name" "passed"
  done
  if [ -n "$fell_back" ] || ! grep -q '^module: ' "$work/log"; then
    skip "the same by PTX" "that was PTX already"
    return
  fi
  export CHECK_MODULE=ptx
  for name in $names; do check "$name, by PTX" 15 "$tools/check" tiny "$name"; done
  unset CHECK_MODULE
}

step_checks() {
  check "all kernels" 45 "$tools/check" others
  if [ -n "$simulated" ]; then
    skip "attention with head_dim 64" "simulator/check.sh runs it"
  else
    check "attention with head_dim 64" 45 "$tools/check" narrow
  fi
  check "offsets above 2^31" 60 "$tools/check" large
  check "equal bits of one larger call" 30 "$tools/check" repeat ${simulated:+3}
}

step_sanitizer() {
  if [ -n "$simulated" ]; then return; fi
  if ! command -v compute-sanitizer >/dev/null; then skip compute-sanitizer "not installed"; return; fi
  local tool
  for tool in memcheck synccheck; do
    # The calls were right without it, so its word does not end the run. That a module lacks a kernel is no error: each is
    # asked for every kernel.
    measure "$tool of the smallest calls" 60 compute-sanitizer --tool "$tool" --report-api-errors no \
      --error-exitcode 86 "$tools/check" tiny all && row "$tool of the smallest calls" "passed"
  done
}

step_timings() {
  if [ ! -d "$lists" ]; then skip "attention over the product's lists" "there are none"; return; fi
  if [ -n "$simulated" ]; then
    check "the lists of 64 x 64 tokens" 10 "$tools/bench" attention "$lists" --no-timings
    return
  fi
  check "attention over the product's lists" 60 "$tools/bench" attention "$lists"
  awk -F ' *[|] *' '$5 + 0 > 0 { print "| timings | " $2 ", " $4 ", masks " $3 " | " $5 " ms, " $6 " TFLOP/s |" }' \
    "$work/log" >>"$rows"
  if ! has_module torch; then skip "SDPA and FlexAttention" "torch is not installed"; return; fi
  measure "SDPA and FlexAttention" 60 "$python" "$kernels/checks/peers.py" || true
  awk -F ' *[|] *' '$3 + 0 > 0 { print "| timings | " $2 " | " $3 " ms |" }' "$work/log" >>"$rows"
}

step_counters() {
  if [ -n "$simulated" ]; then return; fi
  if ! command -v ncu >/dev/null; then skip ncu "not installed"; return; fi
  if [ ! -d "$lists" ]; then skip ncu "there are no lists"; return; fi
  measure "counters" 60 ncu --csv --kernel-name 'regex:^(forward|forward_sm90a|query|key)_bf16_128$' \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \
    "$tools/bench" once "$lists" >"$work/counters" || { tail -5 "$work/counters" && return; }
  # Of its columns, 5 is the kernel, 13 the metric, 14 the unit and 15 the value.
  awk -F '","' '$13 ~ /^(Duration|.* Throughput|L2 Hit Rate|Warp Cycles Per Issued Instruction)$/ {
    print "| counters | " $5 ", " $13 " | " $15 " " $14 " |"
  }' "$work/counters" | tr -d '"' | tee -a "$rows"
}

picture() { # DTYPE LEAST
  local options=(--seed 1 --dtype "$1") device
  [ -z "$simulated" ] || options+=(--width 64 --height 64 --steps 1)
  for device in cpu cuda:0; do
    check "mini-flux in $1 on $device" 40 "$clearform" generate "$model" "a red apple" "${options[@]}" \
      --device "$device" -o "$work/$1-$device.png"
  done
  check "the two pictures in $1, PSNR" 5 "$tools/picture" "$work/$1-cpu.png" "$work/$1-cuda:0.png" "$2"
  row "difference in $1" "$(cat "$work/log")"
}

bench_step() { # GRID
  local options=(--double 19 --single 38 --width 3072 --dtype bf16 --attention clear:r=16 --repeat 1) poll=
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --id=0 --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=100 >"$work/memory" 2>/dev/null &
    poll=$!
  fi
  local status=0
  measure "a step of $1 tokens" 60 "$clearform" bench step --grid "$1" "${options[@]}" --device cuda:0 || status=$?
  [ -z "$poll" ] || { kill "$poll" && wait "$poll" || true; }
  [ "$status" = 0 ] || return 0
  row "a step of FLUX's shape, $1 tokens, r = 16" "$(grep -oE '[0-9.]+ m?s *$' "$work/log" | tail -1)"
  [ -z "$poll" ] || row "its peak memory, $1 tokens" "$(sort -n "$work/memory" | tail -1) MiB"
}

# Whether there is a program that runs here; one that lacks a library does not even start.
has_program() {
  local driver
  [ -n "$clearform" ] || { skip "$step" "no clearform was given" && return 1; }
  driver=$(nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || driver=
  if [[ $driver =~ ^([0-9]+) ]] && ((BASH_REMATCH[1] < 580)); then
    skip "$step" "driver $driver, but a program built with CUDA 13 needs 580" && not_run+=("$step") && return 1
  fi
  "$clearform" --version >"$work/log" 2>&1 || {
    skip "$step" "$(tail -1 "$work/log")" && not_run+=("$step") && return 1
  }
}

step_program() {
  has_program || return 0
  # Rounding adds up over the steps: the CPU's own pictures in bf16 and f32 are 57 dB apart.
  picture bf16 30
  picture f16 30
  if [ -n "$simulated" ]; then return; fi
  check "mini-flux is converted" 45 "$clearform" convert "$model" -o "$work/model" --radius 4 --steps 20 --batch 4 \
    --sample-count 8 --device cuda:0
  check "the converted model is whole" 10 "$clearform" verify "$work/model"
  local grid
  for grid in 64x64 128x128 512x512; do bench_step "$grid"; done
}

step_peers() {
  if [ -n "$simulated" ]; then return; fi
  has_program || return 0
  if ! has_module torch || ! has_module diffusers; then skip diffusers "torch or diffusers is not installed"; return; fi
  local grid
  for grid in 64x64 128x128; do
    measure "a step of $grid tokens beside diffusers" 90 "$python" "$peers/step.py" "$clearform" --device cuda:0 \
      --dtype bf16 --rounds 1 --grid "$grid" --width 3072 --double 19 --single 38 --attention clear:r=16 || continue
    row "milliseconds of a step of $grid tokens" "$(tail -1 "$work/log")"
  done
}

if begin 1 device; then step_device; fi
if begin 2 tiny; then step_tiny; fi
if begin 3 checks; then step_checks; fi
if begin 4 sanitizer; then step_sanitizer; fi
if begin 5 timings; then step_timings; fi
if begin 6 counters; then step_counters; fi
if begin 7 program; then step_program; fi
if begin 8 peers; then step_peers; fi

printf '\n== 9 table (%ss)\n' "$SECONDS"
[ ${#not_run[@]} -eq 0 ] || printf 'not run: %s\n' "${not_run[@]}"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}" && exit 1; }
[ ${#not_run[@]} -eq 0 ] || exit 3
