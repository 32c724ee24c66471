#!/usr/bin/env bash
# The library as other programs use it: its examples run, and a program in a workspace of its own compiles and runs.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
target=${CARGO_TARGET_DIR:-$repository/target}
# With the features of `cargo test --workspace`, which has built the examples.
cargo build --quiet --workspace --examples
example() { "$target/debug/examples/$1" "${@:2}"; }

example convert assets/mini-flux/base "$out/model" 2
example generate_with_lora "$out/model" assets/mini-flux/lora "cat face" "$out/lora.png"
example progress "$out/model" "cat face" "$out/cat.png"
[ "$(example progress "$out/model" "cat face" "$out/never.png" 2)" = cancelled ]
[ -s "$out/lora.png" ] && [ -s "$out/cat.png" ] && [ ! -e "$out/never.png" ]

mkdir -p "$out/foreign/src"
cat > "$out/foreign/Cargo.toml" <<TOML
[package]
name = "foreign"
version = "0.1.0"
edition = "2024"

[dependencies]
clearform = { path = "$repository/crates/clearform" }

[workspace]
TOML
cat > "$out/foreign/src/main.rs" <<'RUST'
fn main() -> clearform::Result<()> {
    let model = std::env::args().nth(1).unwrap_or_default();
    let inspection = clearform::inspect(model.as_ref(), &clearform::SourceOptions::default(), &mut ())?;
    assert!(inspection.is_complete());
    println!("{}", clearform::verify(model.as_ref())?);
    Ok(())
}
RUST
cp Cargo.lock "$out/foreign/"
cargo run --quiet --manifest-path "$out/foreign/Cargo.toml" --target-dir "$target" -- "$out/model"
printf 'the library works: three examples, and a program in a workspace of its own\n'
