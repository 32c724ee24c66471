#!/usr/bin/env bash
# Runs every plugin under valgrind, from its library and linked into the program; there must be no invalid access and
# no leak. Run it after `cargo test --workspace`, which builds the binaries. Memory of threads that still run at the end
# does not count as leaked.
set -euo pipefail
cd "$(dirname "$0")/.."
export RAYON_NUM_THREADS=2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/plugins"
for plugin in lora_library controlnet_library example; do
  cp "target/debug/deps/libclearform_$plugin.so" "$work/plugins/"
done
for plugin in scale constant; do
  cc -shared -fPIC -std=c99 -g -I crates/plugin-abi/include "tests/abi/$plugin.c" -o "$work/plugins/lib$plugin.so"
done

checked() {
  echo "$@"
  valgrind --quiet --error-exitcode=9 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
    target/debug/clearform "$@" >"$work/output" 2>&1 || { cat "$work/output"; return 1; }
}

# Makes a model folder like that of save_pretrained from a fixture.
model() {
  mkdir "$work/$1"
  cp "$2/config.json" "$work/$1/"
  cp "$2/weights.safetensors" "$work/$1/diffusion_pytorch_model.safetensors"
}

for library in "$work"/plugins/*.so; do
  checked plugins check "$library"
done
for linked in lora controlnet; do
  checked plugins check "$linked"
done
model flux tests/fixtures/flux/head24
for format in kohya loha aitoolkit_lokr peft_dora; do
  checked forward "$work/flux" --inputs tests/fixtures/lora/input.safetensors -o "$work/out.safetensors" --overwrite \
    --plugin-dir "$work/plugins" --lora "tests/fixtures/lora/$format.safetensors"
done
model base tests/fixtures/controlnet/base
checked forward "$work/base" --inputs tests/fixtures/controlnet/input.safetensors -o "$work/out.safetensors" --overwrite \
  --plugin-dir "$work/plugins" --controlnet tests/fixtures/controlnet/one-two --controlnet tests/fixtures/controlnet/two-two
echo "no errors found"
