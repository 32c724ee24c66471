#!/usr/bin/env bash
# clearform on the simulated device: whatever runs a model gets `--device cuda:0`.
built=$(cd "$(dirname "$0")/../../target" && pwd)
case ${1-} in
forward | generate | convert | distill | compare) set -- "$@" --device cuda:0 ;;
esac
LD_LIBRARY_PATH=$built/simulator exec "$built/simulated/debug/clearform" "$@"
