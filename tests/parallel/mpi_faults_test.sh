#!/bin/bash
# Faults of MPI ranks: mpi_faults_test.sh MPIRUN PROGRAM RANKS SCENARIO EXIT_CODE SEEN PATTERN
# The job must end with EXIT_CODE within 20 s, SEEN ranks must have printed a line "SAW ..." with the
# PATTERN, no rank may have missed the fault, and no process may be left.
set -u
mpirun=$1 program=$2 ranks=$3 scenario=$4 exit_code=$5 seen=$6 pattern=$7
mark="certkv-fault-$$"
output=$(timeout -k 1 20 "$mpirun" --oversubscribe --bind-to none -np "$ranks" \
  -x CERTKV_FAULT_MARK="$mark" "$program" "$scenario" 2>&1)
code=$?
echo "$output"
failed=0
[ "$code" = "$exit_code" ] || { echo "FAILED: exit code $code, not $exit_code"; failed=1; }
count=$(grep -c "^SAW [0-9]*: .*$pattern" <<<"$output")
[ "$count" = "$seen" ] || { echo "FAILED: $count ranks saw '$pattern', not $seen"; failed=1; }
grep -q "^NOTHING" <<<"$output" && { echo "FAILED: a rank saw no fault"; failed=1; }
sleep 0.3
for environment in /proc/[0-9]*/environ; do
  if grep -aqs "$mark" "$environment" && [ "${environment#/proc/$$/}" = "$environment" ]; then
    echo "FAILED: process ${environment//[^0-9]/} is left"
    failed=1
  fi
done
exit $failed
