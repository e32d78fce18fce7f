# shellcheck shell=bash
# The stages of tests/run. Sourced after launcher/lib.sh; counts add up over the stages.

passed=0 failed=0 skipped=0

# The tests a stage runs. `default` leaves out `long`; the sanitizer presets run what they can
# judge, the unit and thread-rank tests, without `slow` (tests/README.md).
select_tests() {
  local preset=$1 what=$2
  if [[ $what == long ]]; then
    printf '%s\n' -L '^long$'
  elif [[ $what == cuda ]]; then
    printf '%s\n' -L '^cuda$' -LE '^long$'
  elif [[ $preset == asan || $preset == tsan ]]; then
    printf '%s\n' -L '^(unit|ranks)$' -LE '^(slow|long)$'
  else
    printf '%s\n' -LE '^long$'
  fi
}

# run_stage PRESET JOBS FILTER [long]: one preset, configured, built and tested. Never ends the run:
# what fails is counted, so that the closing line is always printed.
run_stage() {
  local wanted=$1 jobs=$2 filter=$3 what=${4:-default} started=$SECONDS selection targets=()
  choose_build "$wanted"
  # CI compiles for one architecture whatever machine it runs on.
  if [[ ${tier:-} == ci && $preset == cuda ]]; then
    configure_args+=(-DCERTKV_CUDA_ARCHITECTURES=90)
    targets=(certkv_cuda_tests)
    what=cuda
  elif [[ $preset == asan || $preset == tsan ]]; then
    targets=(certkv_sanitized_tests)
  fi
  if ! configure_and_build "$jobs" "${targets[@]}"; then
    failed=$((failed + 1))
    return 0
  fi
  say "built in $((SECONDS - started)) s"
  mapfile -t selection < <(select_tests "$preset" "$what")
  [[ -z $filter ]] || selection+=(-R "$filter")
  run_ctest "$jobs" "${selection[@]}"
  say "$preset: done in $((SECONDS - started)) s"
}

# run_ctest JOBS SELECTION...: in $build_dir; adds to the counts, prints the log's path on failure.
run_ctest() {
  local jobs=$1 log=$PWD/$build_dir/logs/test.log junit=$PWD/$build_dir/logs/test.xml status=0 counts
  shift
  rm -f "$junit"
  say "test: ctest in $build_dir/ with $jobs job(s), $*"
  ctest --test-dir "$build_dir" --parallel "$jobs" --output-on-failure --no-tests=error \
    --output-junit "$junit" "$@" 2>&1 | tee "$log" | grep -Ev '^ +Start +[0-9]+: ' || status=$?
  if ! counts=$(python3 tests/support/count_tests.py "$junit"); then
    say "no test ran; full log: $log"
    failed=$((failed + 1))
    return 0
  fi
  read -r stage_passed stage_failed stage_skipped <<<"$counts"
  passed=$((passed + stage_passed)) failed=$((failed + stage_failed))
  skipped=$((skipped + stage_skipped))
  # ctest can also fail without a failed test (an unreadable test list): that must not look green.
  if ((status != 0 && stage_failed == 0)); then
    failed=$((failed + 1))
  fi
  if ((status != 0 || stage_failed != 0)); then
    say "$preset: $stage_failed failed; full log: $log"
  fi
}

close_run() {
  ((skipped == 0)) || say "$skipped skipped (their reasons are in the logs)"
  printf '%d passed, %d failed\n' "$passed" "$failed"
  ((failed == 0))
}

# Reports the files that clang-format would change. Only version 14 (Debian 12) is asked, because
# versions disagree; it reports and never fails: layout is the author's to mend.
report_format() {
  local version files
  if ! command -v clang-format >/dev/null; then
    say "format: not checked, because clang-format is not installed"
    return 0
  fi
  version=$(clang-format --version | grep -Eo '[0-9]+' | head -n 1)
  if [[ $version != 14 ]]; then
    say "format: not checked, because clang-format is version $version and the files follow 14"
    return 0
  fi
  files=$(find_sources | xargs -0 -r clang-format --dry-run 2>&1 |
    sed -n 's/^\(.*\):[0-9]*:[0-9]*: warning: code should be clang-formatted.*/\1/p' | sort -u)
  if [[ -z $files ]]; then
    say "format: every file is as clang-format 14 writes it"
  else
    say "format: clang-format 14 would change (reported, not failed):"
    printf '%s\n' "$files" | sed 's/^/  /'
  fi
}

find_sources() {
  find kernels parallel kvstore runtime launcher tests \
    \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0
}

# run_tidy PRESET JOBS: clang-tidy over every translation unit of the preset's build.
run_tidy() {
  local jobs=$2
  choose_build "${1:-cpu}"
  configure_and_build "$jobs"
  say "tidy: clang-tidy with .clang-tidy, log in $build_dir/logs/tidy.log"
  find kernels parallel kvstore runtime launcher -name '*.cc' -print0 |
    xargs -0 -r -n 1 -P "$jobs" clang-tidy -p "$build_dir" --quiet 2>/dev/null |
    tee "$build_dir/logs/tidy.log"
}
