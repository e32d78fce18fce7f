#include "kernels/attend.h"
#include "launcher/commands.h"

#include <fmt/core.h>

#include "runtime/options_io.h"

namespace certkv {

namespace {

constexpr Command kCommands[] = {
    {"ask", "one question about one text, in this process alone", ask_command},
    {"attend", "one certified attention step on your own tensors", attend_command},
    {"bench", "times of attention and of whole steps on this machine", bench_command},
    {"demo-batch", "questions with known answers over long texts, and their score", demo_batch_command},
    {"doctor", "what this machine has, and whether a configuration fits it", doctor_command},
    {"make-model", "write a demo model whose answers are known", make_model_command},
    {"run", "answer a batch of requests, on all ranks of mpirun or in this process", run_command},
    {"store", "serve a node's originals to its ranks (a job starts it by itself)", store_command},
    {"store-server", "serve a store's originals to other nodes (the store starts it by itself)",
     store_server_command},
    {"verify", "check an audit's certificates against the originals, in float64", verify_command},
};

std::string short_help() {
  std::string text =
      "certkv: batch inference with quantised keys and values, and an error certificate for every\n"
      "attention output\n\n"
      "usage: certkv COMMAND [--key value ...]\n\n";
  for (const Command& command : commands()) {
    text += fmt::format("  {:<12} {}\n", command.name, command.summary);
  }
  return text + "\ncertkv COMMAND --help lists the keys of a command; certkv --version.\n";
}

}  // namespace

std::span<const Command> commands() {
  return kCommands;
}

int exit_code_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::InvalidArgument:
    case ErrorKind::BadFile:
      return kExitUsage;
    case ErrorKind::StoreLost:
    case ErrorKind::CommError:
    case ErrorKind::DeadlineExceeded:
    case ErrorKind::IoError:
    case ErrorKind::Stopped:
      return kExitStopped;
    case ErrorKind::OutOfMemory:
    case ErrorKind::OriginalsLost:
    case ErrorKind::Corrupt:
    case ErrorKind::NonFinite:
    case ErrorKind::DeviceError:
    case ErrorKind::Uncertifiable:
      return kExitOther;
  }
  return kExitOther;
}

int dispatch(Args& args, const std::vector<std::string>& command_line) {
  std::vector<std::string> words = command_line;
  const bool asks_help =
      !words.empty() && (words[0] == "help" || words[0] == "--help" || words[0] == "-h");
  if (asks_help && words.size() >= 2) words = {words[1], "--help"};  // certkv help run
  if (words.empty() || words[0] == "help" || words[0] == "--help" || words[0] == "-h") {
    fmt::print("{}", short_help());
    return kExitDone;
  }
  if (words[0] == "--version" || words[0] == "-V") {
    fmt::print("certkv {}\n", CERTKV_VERSION);
    return kExitDone;
  }
  std::vector<std::string> names;
  for (const Command& command : commands()) {
    if (words[0] == command.name) {
      attend_isa();  // a CERTKV_ISA that this machine does not run is refused before any work
      args.command = words[0];
      args.values.assign(words.begin() + 1, words.end());
      return command.run(args);
    }
    names.emplace_back(command.name);
  }
  CERTKV_THROW(InvalidArgument,
               "unknown command '{}'; the nearest is '{}' (certkv --help lists them)",
               words[0].substr(0, 64), nearest_word(words[0], names));
}

}  // namespace certkv
