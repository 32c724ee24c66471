#!/usr/bin/env bash
# clearform on the simulated device: whatever runs a model gets `--device cuda:0`.
simulated=$(cd "$(dirname "$0")/../../target/simulated" && pwd)
case ${1-} in
forward | generate | convert | distill | compare) set -- "$@" --device cuda:0 ;;
esac
LD_LIBRARY_PATH=$simulated/toolkit/lib64 exec "$simulated/debug/clearform" "$@"
