#!/usr/bin/env bash
# clearform on the simulated device: adds `--device cuda:0` to the commands that run a model; --no-distill runs none.
built=$(cd "$(dirname "$0")/../../target" && pwd)
case "${1-} $*" in
*--no-distill*) ;;
forward\ * | generate\ * | convert\ * | distill\ * | compare\ *) set -- "$@" --device cuda:0 ;;
esac
LD_LIBRARY_PATH=$built/simulator exec "$built/simulated/clearform" "$@"
