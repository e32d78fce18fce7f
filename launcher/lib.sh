# shellcheck shell=bash
# What launcher/quickstart and tests/run share: packages, the choice of a preset, configure, build.
# Sourced by bash; the caller has `set -euo pipefail` and is at the root of the tree.

# Debian 12 packages that configuring and building need. The names are those that the configure
# step prints (kernels/base/cmake/CertkvDependencies.cmake); keep the two in step.
certkv_packages=(
  build-essential cmake ninja-build pkg-config ccache python3
  libopenmpi-dev openmpi-bin libucx-dev libboost-dev libyaml-cpp-dev nlohmann-json3-dev
  libcli11-dev libfmt-dev libspdlog-dev libssl-dev libxxhash-dev libpcre2-dev libutf8proc-dev
  libsentencepiece-dev libopenblas-dev libhwloc-dev prometheus-cpp-dev
  libgtest-dev libgmock-dev)

say() { printf '== %s\n' "$*"; }
fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-1}"
}

# missing_packages NAME...: those that dpkg does not have installed, one per line. Needs no network.
missing_packages() {
  local package status
  for package in "$@"; do
    status=$(dpkg-query -W -f '${db:Status-Status} ' "$package" 2>/dev/null) || status=''
    [[ " $status " == *' installed '* ]] || printf '%s\n' "$package"
  done
}

# ensure_packages INSTALL NAME...: installs what is missing, or with INSTALL=no refuses with the
# list. Nothing missing: apt-get is not called at all.
ensure_packages() {
  local install=$1 missing as_root=()
  shift
  if ! command -v dpkg-query >/dev/null; then
    say "packages: this is not a Debian system; the configure step names what is missing"
    return 0
  fi
  mapfile -t missing < <(missing_packages "$@")
  if ((${#missing[@]} == 0)); then
    say "packages: all $# are installed"
    return 0
  fi
  local line="apt-get install ${missing[*]}"
  if [[ $install == no ]]; then
    fail "packages are missing and --no-install was given. To install them:"$'\n'"  $line" 2
  fi
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      fail "packages are missing, and there is no sudo. As root:"$'\n'"  $line" 2
    as_root=(sudo)
  fi
  say "packages: $line"
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -q --no-install-recommends "${missing[@]}"
}

# Where the CUDA compiler is, also when it is not on PATH; empty and 1 if there is none.
find_nvcc() {
  local candidate
  for candidate in "${CUDACXX:-}" "$(command -v nvcc || true)" \
    "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" /usr/local/cuda/bin/nvcc; do
    if [[ -n $candidate && -x $candidate ]]; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  return 1
}

driver_answers() {
  local answer
  answer=$(nvidia-smi -L 2>/dev/null) && [[ $answer == 'GPU '* ]]
}

# choose_build PRESET: sets preset, build_dir and configure_args. An empty PRESET lets the machine
# decide (cuda where an NVIDIA driver answers, else cpu) and builds in build/; a named one builds in
# build-PRESET/.
choose_build() {
  local wanted=$1 nvcc
  configure_args=()
  if [[ -n $wanted ]]; then
    preset=$wanted
    build_dir=build-$wanted
  else
    preset=cpu
    build_dir=build
    if driver_answers; then
      if find_nvcc >/dev/null; then
        preset=cuda
      else
        say "an NVIDIA driver answers, but no nvcc was found (PATH, CUDACXX, CUDA_HOME," \
          "/usr/local/cuda): building the CPU backend"
      fi
    fi
  fi
  if [[ $preset == cuda ]]; then
    nvcc=$(find_nvcc) || fail "the preset cuda needs nvcc (CUDA Toolkit 12.4 or newer): put it on \
PATH, or set CUDACXX or CUDA_HOME, or use --preset cpu" 2
    export CUDACXX=$nvcc
  fi
}

# As many jobs as there are processors, and no more than memory carries at about 1.5 GB each.
default_jobs() {
  local processors available_kb limit cgroup=/sys/fs/cgroup/memory.max by_memory
  processors=$(nproc)
  available_kb=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
  if [[ -r $cgroup ]]; then
    limit=$(<"$cgroup")
    if [[ $limit =~ ^[0-9]+$ ]] && ((limit / 1024 < available_kb)); then
      available_kb=$((limit / 1024))
    fi
  fi
  by_memory=$((available_kb / 1500000))
  ((by_memory >= 1)) || by_memory=1
  echo $((processors < by_memory ? processors : by_memory))
}

# ccache must not break a build: without a folder it can write, it is switched off.
settle_ccache() {
  local folder=${CCACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/ccache}
  if ! mkdir -p "$folder" 2>/dev/null || [[ ! -w $folder ]]; then
    export CCACHE_DISABLE=1
  fi
  # Another clone of the same sources, and another build folder, may use what this one compiled.
  export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
}

# Open MPI refuses to run as root unless told twice.
allow_root_mpi() {
  if ((EUID == 0)); then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
}

# logged LOG COMMAND...: shows the output, keeps it in LOG, returns the command's own status.
logged() {
  local log=$1
  shift
  mkdir -p "${log%/*}"
  "$@" 2>&1 | tee "$log"
}

# configure_and_build JOBS [TARGET...]: with what choose_build set. Logs in $build_dir/logs.
configure_and_build() {
  local jobs=$1 logs=$build_dir/logs targets=()
  shift
  (($# == 0)) || targets=(--target "$@")
  say "configure: preset $preset in $build_dir/"
  logged "$logs/configure.log" cmake --preset "$preset" -B "$build_dir" "${configure_args[@]}" || {
    say "configuring failed; full log: $PWD/$logs/configure.log"
    return 1
  }
  say "build: $build_dir/ with $jobs job(s)"
  logged "$logs/build.log" cmake --build "$build_dir" --parallel "$jobs" "${targets[@]}" || {
    say "building failed; full log: $PWD/$logs/build.log"
    return 1
  }
}
