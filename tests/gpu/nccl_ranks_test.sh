#!/bin/bash
# nccl_ranks_test.sh EXIT_CODE COMMAND...: the job must end with that code within a minute; 77, no GPU
# answers, is passed on.
set -u
expected=$1
shift
export NCCL_NVLS_ENABLE=0 NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# mpirun ends the job of a stopped rank only by its own death.
timeout --kill-after=5 60 "$@"
code=$?
[ "$code" = 77 ] && exit 77
[ "$code" = "$expected" ] && exit 0
echo "FAILED: exit code $code, not $expected"
exit 1
