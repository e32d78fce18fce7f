#!/bin/bash
# Faults of MPI ranks: mpi_faults_test.sh MPIRUN PROGRAM RANKS SCENARIO EXIT_CODE SEEN PATTERN
# The job must end with EXIT_CODE within 20 s, SEEN ranks must have printed a line "SAW ..." with the
# PATTERN, no rank may have missed the fault, and no process and no shared memory may be left. Under
# the scenario "work" mpirun itself is killed (kill -9) once all ranks work; its shared memory stays.
set -u
mpirun=$1 program=$2 ranks=$3 scenario=$4 exit_code=$5 seen=$6 pattern=$7
mark="certkv-fault-$$"
log=$(mktemp)
shm=$(mktemp -d /dev/shm/certkv-fault.XXXXXX)
trap 'rm -rf "$log" "$shm"' EXIT
"$mpirun" --oversubscribe --bind-to none -np "$ranks" \
  --mca btl_vader_backing_directory "$shm" -x CERTKV_FAULT_MARK="$mark" "$program" "$scenario" >"$log" 2>&1 &
job=$!
for ((tenths = 0; tenths < 200; tenths++)); do
  kill -0 "$job" 2>/dev/null || break
  [ "$scenario" = work ] && [ "$(grep -c '^SAW' "$log")" = "$ranks" ] && kill -9 "$job"
  sleep 0.1
done
kill -9 "$job" 2>/dev/null && echo "FAILED: not over after 20 s"
wait "$job"
code=$?
output=$(cat "$log")
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
if [ "$scenario" != work ] && [ -n "$(ls -A "$shm")" ]; then
  echo "FAILED: shared memory is left: $(ls -A "$shm")"
  failed=1
fi
exit $failed
