// Runs a command, says what went wrong, and ends the process and its peers. Nothing else does.
#include <fmt/core.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <thread>

#include "launcher/commands.h"
#include "parallel/mpi_session.h"

namespace {

using namespace certkv;

// All ranks of a node that are told the same wrong configuration find the same error. The first one
// says it and ends, whereupon the launcher ends the others; they speak only if it did not.
void let_first_local_rank_speak() {
  for (const char* name : {"OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"}) {
    const char* text = std::getenv(name);
    if (text == nullptr) continue;
    if (std::atoi(text) > 0) {
      std::signal(SIGTERM, SIG_DFL);  // how the launcher ends this one
      std::this_thread::sleep_for(std::chrono::seconds(3));
    }
    return;
  }
}

void print_error(const MpiLaunch& launch, const std::string& message) {
  const std::string rank = launch.rank > 0 ? fmt::format(" (rank {})", launch.rank) : "";
  fmt::print(stderr, "certkv: error{}: {}\n", rank, message);
  std::fflush(stderr);
}

// A launcher that is itself being ended (SIGTERM to mpirun) answers MPI_Finalize no more, and kills
// what waits for it. Everything is written by now, so a stopped job does not wait for that.
void end_soon(int code) {
  std::thread([code] {
    std::this_thread::sleep_for(std::chrono::milliseconds(400));
    ::_exit(code);
  }).detach();
}

// What libraries do at the end of a process can hang: OpenBLAS's threads wait for memory for ever
// where an address space limit (ulimit -v) refuses it.
volatile std::sig_atomic_t code_at_last = kExitOther;
void end_at_last(int code) {
  code_at_last = code;
  std::signal(SIGALRM, [](int) { ::_exit(code_at_last); });
  ::alarm(3);
}

}  // namespace

int main(int argc, char** argv) {
  // A file that may not grow (ulimit -f) is an error by name, not the end of the process.
  std::signal(SIGXFSZ, SIG_IGN);
  Args args;
  const MpiLaunch launch = detect_mpi_launch();
  int code = kExitOther;
  bool threw = true;
  try {
    code = dispatch(args, {argv + (argc > 0 ? 1 : 0), argv + argc});
    threw = false;
  } catch (const Error& e) {
    code = exit_code_of(e.kind());
    if (launch.by_launcher && code == kExitUsage) let_first_local_rank_speak();
    print_error(launch, e.what());
  } catch (const std::bad_alloc&) {
    print_error(launch, "out of host memory; certkv doctor --config FILE says what a job needs");
  } catch (const std::exception& e) {
    print_error(launch, fmt::format("unexpected: {}", e.what()));
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    print_error(launch, "writing to standard output failed; is the disk full?");
    if (code == kExitDone) code = kExitStopped;
  }
  if (args.mpi != nullptr && code == kExitStopped) end_soon(code);
  // A rank that threw must not wait for the others, which may be waiting for it.
  if (args.mpi != nullptr && (threw || !args.mpi->finish())) args.mpi->abort(code);
  end_at_last(code);
  return code;
}
