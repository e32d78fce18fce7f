// Seeded mutations of a target's seeds, through its entry, as one GoogleTest case. The entry aborts
// where a promise is broken; the input that did it is then left in a file.
//   CERTKV_FUZZ_RUNS=n      so many runs instead of the target's own
//   CERTKV_FUZZ_CORPUS=DIR  writes the seeds into the folder (for libFuzzer) instead of running
//   them
#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "tests/fuzz/target.h"

namespace certkv::fuzz {
namespace {

// Parsers have one thread: ThreadSanitizer, ten times slower, finds nothing new in more of them.
#if defined(__SANITIZE_THREAD__)
constexpr int kShare = 10;
#else
constexpr int kShare = 1;
#endif

const std::string* current = nullptr;  // the input that runs

void feed(const std::string& input) {
  current = &input;
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  current = nullptr;
}

// Inputs that reached new code when libFuzzer ran (run.py --keep).
std::vector<std::string> committed() {
  std::vector<std::string> inputs;
  std::string target;  // ModelConfigFuzz: model_config
  for (const char c : std::string(plan().name)) {
    if (c >= 'A' && c <= 'Z' && !target.empty()) target += '_';
    target += char(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  }
  target.resize(target.rfind("_fuzz"));
  const auto folder = std::filesystem::path(CERTKV_FUZZ_CORPUS) / target;
  if (!std::filesystem::is_directory(folder)) return inputs;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    std::ifstream in(file.path(), std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  return inputs;
}

// The process is lost in any case, so this may use what a signal handler should not.
void keep_input(int signal) {
  std::signal(signal, SIG_DFL);
  if (current != nullptr) {
    const std::string file =
        (std::filesystem::temp_directory_path() / ("crash-" + std::string(plan().name))).string();
    std::ofstream(file, std::ios::binary) << *current;
    std::fprintf(stderr, "the input lies in %s\n", file.c_str());
  }
  std::raise(signal);
}

class Mutations : public testing::Test {
  void TestBody() override {
    const Plan p = plan();
    if (const char* folder = std::getenv("CERTKV_FUZZ_CORPUS")) {
      std::filesystem::create_directories(folder);
      for (size_t i = 0; i < p.seeds.size(); ++i)
        std::ofstream(std::filesystem::path(folder) / std::to_string(i), std::ios::binary)
            << p.seeds[i];
      GTEST_SKIP() << p.seeds.size() << " seeds written, none run";
    }
    for (const int s : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) std::signal(s, keep_input);
    const char* wanted = std::getenv("CERTKV_FUZZ_RUNS");
    const int runs = wanted != nullptr ? std::atoi(wanted) : p.runs / kShare;
    ASSERT_GT(runs, 0);
    ASSERT_FALSE(p.seeds.empty() || p.pieces.empty());
    for (const std::string& seed : p.seeds) feed(seed);
    EXPECT_GE(accepted, p.seeds.size()) << "the seeds are no beginning";
    for (const std::string& input : committed()) feed(input);
    std::mt19937_64 random(20260731);
    const auto below = [&random](size_t n) { return size_t(random() % n); };
    for (int i = 0; i < runs; ++i) {
      std::string text = p.seeds[below(p.seeds.size())];
      for (size_t edits = 1 + below(6); edits > 0; --edits) {
        const size_t at = below(text.size() + 1);
        switch (below(5)) {
          case 0:
            text.insert(at, p.pieces[below(p.pieces.size())]);
            break;
          case 1:
            text.erase(at, 1 + below(20));
            break;
          case 2:
            if (at < text.size()) text[at] = char(random());
            break;
          case 3: {
            const std::string copy = text.substr(at, 1 + below(40));
            text.insert(below(text.size() + 1), copy);
            break;
          }
          case 4:  // a piece in the place of as many bytes: lengths and offsets stay right
            const std::string& piece = p.pieces[below(p.pieces.size())];
            text.replace(at, piece.size(), piece);
            break;
        }
      }
      feed(text);
    }
    EXPECT_LT(accepted, p.seeds.size() + committed().size() + size_t(runs))
        << "no mutation was refused";
    for (const int s : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) std::signal(s, SIG_DFL);
  }
};

const auto* const registered =
    testing::RegisterTest(plan().name, "MutatedInputsAreRefusedByNameOrReadWell", nullptr, nullptr,
                          __FILE__, __LINE__, []() -> testing::Test* { return new Mutations; });

}  // namespace
}  // namespace certkv::fuzz
