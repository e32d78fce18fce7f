// The subcommands of certkv. Each has its entry point in launcher/<name>.cc.
//
// A command returns its exit code or throws; it never ends the process (launcher/main.cc does).
// It answers --help itself. Exit codes, the same for every command:
//   0  done; every line of a job ended certified or exact (or over where that policy was asked for)
//   1  anything that is not named below
//   2  configuration or arguments are wrong, or ask for more memory than there is
//   3  the answer is no: some lines failed, it does not fit
//   4  stopped before its end: a peer, the store or the disk was lost, or a signal came; a job can
//      be resumed
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"

namespace certkv {

class MpiSession;

struct Args {
  std::string command;
  std::vector<std::string> values;  // what follows the command's name
  // A command that initialises MPI leaves its session here as soon as it has it: main() ends MPI
  // when the command returns, and ends all ranks when it throws, so that none waits for a lost one.
  std::shared_ptr<MpiSession> mpi;
};

struct Command {
  const char* name;
  const char* summary;  // one line
  int (*run)(Args& args);
};

std::span<const Command> commands();

// Finds and runs the command of a command line (program name apart). No command: a short help.
// InvalidArgument for an unknown one, naming the nearest.
int dispatch(Args& args, const std::vector<std::string>& command_line);

int exit_code_of(ErrorKind kind);
constexpr int kExitDone = 0, kExitOther = 1, kExitUsage = 2, kExitNo = 3, kExitStopped = 4;

int ask_command(Args& args);
int attend_command(Args& args);
int bench_command(Args& args);
int demo_batch_command(Args& args);
int doctor_command(Args& args);
int make_model_command(Args& args);
int run_command(Args& args);
int store_command(Args& args);
int store_server_command(Args& args);
int verify_command(Args& args);

}  // namespace certkv
