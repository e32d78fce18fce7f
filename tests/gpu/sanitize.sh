#!/bin/bash
# sanitize.sh BIN_DIR [TOOL...]: compute-sanitizer's memcheck, racecheck, initcheck and synccheck (or
# the tools named) over a small set of the GPU test programs, each within a minute. Prints a table of
# errors; exit code 0: none, 1: some, or a program failed or did not end, 2: wrong use, 77: no GPU.
#   CERTKV_SANITIZER_SECONDS  for one program under one tool [60]
#   CERTKV_SANITIZER_LOGS     folder for what the tools say [none: only what went wrong is printed]
set -u

# Program, cases, and the kernels that racecheck watches: it judges shared memory, of which
# libraries' kernels have much and to which we can do nothing.
readonly set=(
  "gpu_lanes_test *"
  "gpu_pass_test *MissingSlot*:*WithoutTheCert*:*StatesThe*:*DamagedNotes*"
  "gpu_device_cache_test *AFewTokens*"
  "gpu_device_test *Part*:*Parts*:*Beside*:*Mapped*"
  "gpu_model_test *-*EveryKindOfRow*:*WholeVocabulary*"
  "gpu_linear_test Int8*OfAReading*"
  "gpu_seal_test *BeginsTheOpenBlocks*"
  "gpu_device_scrub_test *ABitOfAnOriginal*"
  "gpu_device_canary_test *PaperAsks*"
  "gpu_device_canary_test *ExplorationShows*"
  "gpu_device_canary_test *ReadAheadIsSound*"
)

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; }

if [[ $# -lt 1 || ! -d $1 ]]; then
  usage >&2
  exit 2
fi
bin=$1
shift
tools=("$@")
[[ ${#tools[@]} -gt 0 ]] || tools=(memcheck racecheck initcheck synccheck)
for tool in "${tools[@]}"; do
  case $tool in
    memcheck | racecheck | initcheck | synccheck) ;;
    *)
      echo "sanitize.sh: '$tool' is no tool: memcheck, racecheck, initcheck or synccheck" >&2
      exit 2
      ;;
  esac
done
seconds=${CERTKV_SANITIZER_SECONDS:-60}

sanitizer=$(command -v compute-sanitizer) ||
  sanitizer=$(ls -d "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [[ -z $sanitizer ]]; then
  echo "sanitize.sh: no compute-sanitizer in PATH or ${CUDA_HOME:-/usr/local/cuda}/bin; it comes" \
    "with the CUDA toolkit" >&2
  exit 2
fi
if ! nvidia-smi -L 2>/dev/null | grep -q .; then
  echo "skipped: no NVIDIA GPU answers on this machine"
  exit 77
fi

logs=${CERTKV_SANITIZER_LOGS:-}
if [[ -z $logs ]]; then
  logs=$(mktemp -d)
  trap 'rm -rf "$logs"' EXIT
fi
mkdir -p "$logs" || exit 2

# one TOOL PROGRAM FILTER: a word for the table; returns 1 unless it is 0.
one() {
  local tool=$1 program=$2 filter=$3 log code errors
  log=$logs/$program.${filter//[^A-Za-z0-9]/}.$tool.log  # a program may come with several filters
  if [[ ! -x $bin/$program ]]; then
    echo "absent"
    return 1
  fi
  # A case that skips would be clean without having run.
  timeout --kill-after=5 "$seconds" "$sanitizer" --tool "$tool" --error-exitcode 86 \
    "$bin/$program" "--gtest_filter=$filter" >"$log" 2>&1
  code=$?
  if [[ $code == 124 || $code == 137 ]]; then
    echo "over ${seconds}s"
    return 1
  fi
  if grep -q '\[  SKIPPED \]' "$log" || ! grep -q '\[  PASSED  \] [1-9]' "$log"; then
    echo "failed"
    return 1
  fi
  # "ERROR SUMMARY: N errors"; racecheck: "RACECHECK SUMMARY: N hazards displayed (...)".
  errors=$(sed -n 's/.* SUMMARY: \([0-9]\{1,\}\) \(error\|hazard\).*/\1/p' "$log" | head -n 1)
  if [[ -z $errors ]]; then
    echo "no summary"
    return 1
  fi
  echo "$errors"
  [[ $errors == 0 && $code == 0 ]]
}

bad=0
printf '| %-43s |' program
printf ' %-10s |' "${tools[@]}"
printf '\n|---|'
printf -- '---|%.0s' "${tools[@]}"
printf '\n'
for entry in "${set[@]}"; do
  program=${entry%% *} filter=${entry#* }
  printf '| %-43s |' "$program ${filter//[*:]/ }"
  for tool in "${tools[@]}"; do
    word=$(one "$tool" "$program" "$filter") || bad=1
    printf ' %-10s |' "$word"
  done
  printf '\n'
done

if [[ $bad != 0 ]]; then
  echo
  for log in "$logs"/*.log; do
    [[ -e $log ]] || continue
    if ! grep -q 'SUMMARY: 0 ' "$log" || ! grep -q '\[  PASSED  \] [1-9]' "$log"; then
      echo "--- $(basename "$log")"
      grep -E '========= |FAILED|Failure|SKIPPED' "$log" | head -n 12
    fi
  done
fi
exit "$bad"
