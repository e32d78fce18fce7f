// certkv bench: which measurement, and what they share.
#include "launcher/bench.h"

#include <fmt/core.h>

#include <charconv>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "kernels/blas.h"
#include "runtime/options_io.h"

namespace certkv {
namespace {

constexpr struct {
  const char *name, *summary, *example;
  int (*run)(const std::vector<std::string>& values);
} kBenches[] = {
    {"attention", "one layer's decode attention: dense, certified, and what its parts cost",
     "certkv bench attention --context 32768,131072 --layout compact,balanced",
     bench_attention_command},
    {"classes", "what the precision classes read, beside the fixed layouts",
     "certkv bench classes --model reader --context 4096,16384 --tolerance 0.05,0.01",
     bench_classes_command},
    {"decode", "a model's decode steps in this process, by phase",
     "certkv bench decode --model reader --context 32768 --compare budget,dense",
     bench_decode_command},
    {"prefill", "a model's prefill in this process, by phase, with its peak of memory",
     "certkv bench prefill --model reader --context 8192,16384,32768", bench_prefill_command},
    {"store", "reading and sealing originals, beside memcpy and ucx_perftest",
     "certkv bench store --json store.json", bench_store_command},
};

std::string usage() {
  std::string text = "usage: certkv bench WHAT [--key value ...]\n\n";
  for (const auto& bench : kBenches)
    text += fmt::format("  {:<10} {}\n", bench.name, bench.summary);
  text += "\nfor example:\n";
  for (const auto& bench : kBenches) text += fmt::format("  {}\n", bench.example);
  return text +
         "\ncertkv bench WHAT --help lists the keys; launcher/BENCH.md says how to read the "
         "figures.\n";
}

}  // namespace

bool asks_for_device(const std::vector<std::string>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] == "--backend" && i + 1 < values.size()) return values[i + 1] != "cpu";
    if (values[i].starts_with("--backend=")) return values[i] != "--backend=cpu";
  }
  return false;
}

std::vector<std::string> split_list(const std::string& text, const char* key) {
  std::vector<std::string> words;
  for (size_t from = 0; from <= text.size();) {
    const size_t end = std::min(text.find(',', from), text.size());
    words.push_back(text.substr(from, end - from));
    CERTKV_EXPECT(!words.back().empty(), InvalidArgument,
                  "command line: {} is '{}': words with commas between are needed", key, text);
    from = end + 1;
  }
  return words;
}

std::vector<int64_t> split_numbers(const std::string& text, const char* key, int64_t least) {
  std::vector<int64_t> numbers;
  for (const std::string& word : split_list(text, key)) {
    int64_t n = 0;
    const auto [at, error] = std::from_chars(word.data(), word.data() + word.size(), n);
    CERTKV_EXPECT(error == std::errc() && at == word.data() + word.size() && n >= least,
                  InvalidArgument,
                  "command line: {} is '{}': numbers from {} on, with commas between, are needed",
                  key, text, least);
    numbers.push_back(n);
  }
  return numbers;
}

nlohmann::ordered_json machine_json(const Machine& m, int threads) {
  nlohmann::ordered_json json;
  json["cpu"] = m.cpu;
  json["features"] = m.features;
  json["cores"] = m.cores_usable;
  json["threads"] = threads;
  json["last_level_cache_bytes"] = m.last_cache_bytes;
  json["memory_bytes"] = m.memory_bytes;
  double load[1] = {0};
  json["load_average"] = getloadavg(load, 1) == 1 ? nlohmann::ordered_json(load[0]) : nullptr;
  json["system"] = m.system;
  json["openblas_core"] = blas_core();
  json["compiler"] = __VERSION__;
  json["version"] = CERTKV_VERSION;
  return json;
}

int bench_command(Args& args) {
  std::vector<std::string> values = args.values;
  std::vector<std::string> names;
  for (const auto& bench : kBenches) {
    names.emplace_back(bench.name);
    if (values.empty() || values[0] != bench.name) continue;
    values.erase(values.begin());
    return bench.run(values);
  }
  OptionTable none;
  const auto parsed = none.read_arguments(values, 1);
  if (parsed.help || values.empty()) {
    fmt::print("{}", usage());
    return kExitDone;
  }
  const std::string word = parsed.positional.empty() ? "" : parsed.positional[0];
  CERTKV_THROW(InvalidArgument,
               "command line: certkv bench '{}' is not known; the nearest is '{}' (certkv bench "
               "--help lists them)",
               word.substr(0, 64), nearest_word(word, names));
}

}  // namespace certkv
