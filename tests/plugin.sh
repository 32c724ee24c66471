#!/usr/bin/env bash
# A plugin in a workspace of its own, outside this repository, as plugins/README.md shows it: builds and passes its check.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
target=${CARGO_TARGET_DIR:-$repository/target}
mkdir -p "$work/src"
sed -n '/^```toml$/,/^```$/{/^```/d;p}' plugins/README.md | sed "s|/path/to/clearform|$repository|" > "$work/Cargo.toml"
grep -q '^name = "mine"$' "$work/Cargo.toml" # the block was found
sed 's/^id = "example"/id = "mine"/' plugins/example/plugin.toml > "$work/plugin.toml"
cp plugins/example/src/lib.rs "$work/src/"
cp Cargo.lock "$work/"
cargo build --quiet --manifest-path "$work/Cargo.toml" --target-dir "$target/out-of-tree"
cargo test --quiet --workspace --no-run --test plugins # the program with the features that the tests built it with
library=$(find "$target/out-of-tree/debug" -maxdepth 1 -name '*mine.so' -o -maxdepth 1 -name '*mine.dylib' | head -1)
"$target/debug/clearform" plugins check "$library" | tee "$work/check"
grep -q '^mine ' "$work/check" && grep -q '1 of 1 examples passed' "$work/check"
printf 'a plugin outside the repository works\n'
