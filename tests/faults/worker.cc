// Injects faults into jobs of this process: `faults_worker MODEL FOLDER`, then a line "ROW SEED" on
// standard input for each. It answers every line with one of JSON on standard output. A worker that
// dies over a line has shown a violation; tests/faults/__main__.py starts another.
//   CERTKV_FAULTS_ALSO=TEXT: failpoints that every job has besides its own
//   faults_worker --rows    lists name, row of the fault model, share and what is injected
#include <fmt/format.h>

#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "kernels/base/log.h"
#include "tests/faults/worker.h"

namespace certkv::faults {
namespace {

uint64_t seed_of(const std::string& row, uint64_t seed) {
  uint64_t h = seed ^ 0x9e3779b97f4a7c15;
  for (char c : row) h = (h ^ uint64_t(uint8_t(c))) * 0x100000001b3;
  return h;
}

Outcome inject(Bench& bench, const std::string& name, uint64_t seed) {
  for (const Row& row : rows())
    if (row.name == name) {
      Draw draw(seed_of(name, seed));
      try {
        return row.inject(bench, draw);
      } catch (const std::exception& e) {
        return {Outcome::Result::Violation, fmt::format("an unexpected error: {}", e.what())};
      }
    }
  return {Outcome::Result::Violation, "there is no row of this name"};
}

int run(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--rows") {
    for (const Row& row : rows())
      fmt::print("{}\t{}\t{}\t{}\n", row.name, row.fault, row.share, row.what);
    return 0;
  }
  if (argc != 3) {
    fmt::print(stderr, "usage: faults_worker MODEL FOLDER, or faults_worker --rows\n");
    return 2;
  }
  log_set_level(LogLevel::Error);
  try {
    Bench bench(argv[1], argv[2]);
    fmt::print("ready\n");
    std::fflush(stdout);
    std::string row;
    uint64_t seed = 0;
    while (std::cin >> row >> seed) {
      const auto begin = std::chrono::steady_clock::now();
      const Outcome outcome = inject(bench, row, seed);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      const nlohmann::json line = {{"row", row},
                                   {"seed", seed},
                                   {"result", result_name(outcome.result)},
                                   {"seconds", seconds.count()},
                                   {"text", outcome.text}};
      fmt::print("{}\n", line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
      std::fflush(stdout);
    }
  } catch (const std::exception& e) {
    fmt::print(stderr, "faults_worker: {}\n", e.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace certkv::faults

int main(int argc, char** argv) {
  return certkv::faults::run(argc, argv);
}
