#!/usr/bin/env bash
# Compiles every kernel as C++ and runs it against its plain reference, thread by thread. Needs g++ alone.
set -euo pipefail
cd "$(dirname "$0")"
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT

g++ -std=c++20 -O1 -march=native -Wall -Wextra -Wno-unknown-pragmas \
  -fsanitize=alignment,bounds -fno-sanitize-recover=all check.cpp -o "$built/check"
"$built/check" narrow >"$built/narrow" 2>&1 &
"$built/check" others
wait $! || { cat "$built/narrow"; exit 1; }
cat "$built/narrow"
