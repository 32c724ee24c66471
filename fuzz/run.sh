#!/usr/bin/env bash
# Fuzzes the file readers: fuzz/run.sh SECONDS [TARGET...]. Prints one line per target and fails if anything was found:
# a panic, 10 seconds for one input, or 1 GB of memory. Needs rustup and installs what else it needs.
# No sanitizer: the readers are safe Rust, where a wrong index or value panics; debug assertions and overflow checks are on.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:?SECONDS [TARGET...]}
shift
[ $# -gt 0 ] || set -- adapter controlnet gguf index manifest record safetensors tokenizer torch

cargo +nightly --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal
cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked
host=$(rustc -vV | sed -n 's/^host: //p')
built=${CARGO_TARGET_DIR:-$PWD/target}
for target; do
  cargo +nightly fuzz build --fuzz-dir . --sanitizer none "$target"
done

memory=/dev/shm
[ -w "$memory" ] || memory=/tmp
TMPDIR=$(mktemp -d -p "$memory" clearform-fuzz.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

# Writes the seeds of target $1 into the folder $2.
seed() {
  local fixtures=../tests/fixtures weights=../crates/weights/fixtures file folder
  case $1 in
  adapter) set -- "$2" "$fixtures"/lora/*.safetensors ;;
  controlnet) set -- "$2" "$fixtures"/controlnet/{pixels,xlabs,*/diffusion*}.safetensors ;;
  gguf) set -- "$2" {"$weights"/gguf,"$fixtures"/hostile}/*.gguf ;;
  index) set -- "$2" "$fixtures"/{*,*/*}/config.json ;;
  manifest) set -- "$2" ../manifests/*.toml ;;
  safetensors) set -- "$2" {"$weights"/*,"$fixtures"/hostile}/[!l]*.safetensors ;;
  tokenizer) set -- "$2" seeds/tokenizer/* ../crates/models/fixtures/sentencepiece/spiece.model ;;
  torch) set -- "$2" "$weights"/torch/*.{bin,ckpt,pt,pth} "$fixtures"/hostile/*.{pt,pth} ;;
  *) set -- "$2" seeds/"$1"/* ;;
  esac
  folder=$1
  shift
  for file; do
    case $file in
    */config.json) cat seeds/index/index.json <(echo ---) "$file" ;;
    */spiece.model) cat <(printf s) "$file" <(printf '\n---\n{"extra_ids": 3}') ;;
    */lora/* | */controlnet/*) head -c $(($(od -An -t u8 -N 8 "$file") + 8)) "$file" ;; # without the values
    *) cat "$file" ;;
    esac >"$folder/${file//\//-}"
  done
}

# The last number after $1 in the log.
last() {
  grep -o "$1 *[0-9]*" "$log" | tail -1 | grep -o '[0-9]*$' || echo 0
}

found=0
for target; do
  work=$built/found/$target corpus=$built/corpus/$target log=$built/$target.log
  mkdir -p "$work" "$corpus" "$TMPDIR/$target"
  seed "$target" "$TMPDIR/$target"
  status=ok
  "$built/$host/release/$target" "$corpus" "$TMPDIR/$target" -artifact_prefix="$work/" -max_total_time="$seconds" \
    -max_len=16384 -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 >"$log" 2>&1 || status="FOUND: see $log" found=1
  printf '%-12s %10s executions %6s/s, coverage %5s, peak %4s MB, %s\n' "$target" "$(last number_of_executed_units:)" \
    "$(last average_exec_per_sec:)" "$(last cov:)" "$(last peak_rss_mb:)" "$status"
done
exit "$found"
