#!/usr/bin/env bash
# Installs clearform as the README says, and applies a LoRA and a ControlNet with it in an empty folder: the program
# must contain all that this takes. The build is that of the tests, so that little is compiled again.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
assets=$root/assets/mini-flux

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo install --path crates/cli --root "$work/installed" --locked --debug --target-dir target --quiet
installed=$(ls "$work/installed/bin")
[ "$installed" = clearform ] || { echo "expected the program alone, found: $installed"; exit 1; }

# Runs the program with the arguments after the first two; fails unless it exits with $1 and prints $2.
expect() {
  local expected=$1 text=$2 code=0
  shift 2
  echo "clearform $*"
  "$work/installed/bin/clearform" "$@" >"$work/output" 2>&1 || code=$?
  if [ "$code" != "$expected" ] || ! grep -qF -- "$text" "$work/output"; then
    echo "expected exit code $expected and the text \"$text\", found exit code $code and:"
    cat "$work/output"
    return 1
  fi
}

# Fails unless $1 and $2 are images that differ.
differ() {
  [ -s "$1" ] && [ -s "$2" ] || { echo "expected the images $1 and $2"; return 1; }
  ! cmp -s "$1" "$2" || { echo "expected different images, found the same in $1 and $2"; return 1; }
}

mkdir "$work/empty"
cd "$work/empty"
expect 0 "clearform-lora (linked into the program)" plugins list
expect 0 "examples passed" plugins check lora
expect 0 "examples passed" plugins check controlnet
generate=(generate "$assets/base" hedgehog --steps 2 --seed 3)
expect 0 plain.png "${generate[@]}" -o plain.png
expect 0 ": applied " "${generate[@]}" --lora "$assets/lora" -o lora.png
differ plain.png lora.png
control=(--controlnet "$assets/controlnet" --control-image "$assets/references.png")
expect 0 controlled.png "${generate[@]}" "${control[@]}" -o controlled.png
differ plain.png controlled.png
fixtures=$root/tests/fixtures
mkdir model
cp "$fixtures/flux/head24/config.json" model/
cp "$fixtures/flux/head24/weights.safetensors" model/diffusion_pytorch_model.safetensors
forward=(forward model --inputs "$fixtures/lora/input.safetensors" -o out.safetensors)
forward+=(--lora "$fixtures/lora/kohya.safetensors")
expect 1 "plugins are disabled (--no-plugins)" "${forward[@]}" --no-plugins
[ ! -e out.safetensors ] || { echo "expected no out.safetensors after a refusal"; exit 1; }
expect 0 "kohya.safetensors: applied 99 of 99 tensors to 33 modules" "${forward[@]}"
echo "the installed program applies adapters"
