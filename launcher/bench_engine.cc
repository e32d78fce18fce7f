// certkv bench decode and bench prefill: the whole engine in this process (T = 1), by phase.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "kernels/base/thread_pool.h"
#include "kernels/blas.h"
#include "launcher/bench.h"
#include "parallel/communicator.h"
#include "parallel/local_world.h"
#include "parallel/topology.h"
#include "runtime/bench/gemm_peak.h"
#include "runtime/bench/prefill_work.h"
#include "runtime/demo_batch.h"
#include "runtime/engine_setup.h"
#include "runtime/options_io.h"
#include "runtime/output_file.h"
#include "runtime/tokenizer.h"

namespace certkv {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr size_t kPeakMatrix = 2048;  // 16 MiB each: large enough to run at OpenBLAS's full speed
constexpr int kPeakRepeats = 3;

struct Phase {
  const char* name;
  double StepRecord::Phases::*seconds;
};
constexpr Phase kPhases[] = {
    {"projections", &StepRecord::Phases::projections}, {"append", &StepRecord::Phases::append},
    {"attention", &StepRecord::Phases::attention},     {"judge", &StepRecord::Phases::judge},
    {"ladder", &StepRecord::Phases::ladder},           {"balance", &StepRecord::Phases::balance},
    {"scrub", &StepRecord::Phases::scrub},
    {"communicate", &StepRecord::Phases::communicate}, {"sample", &StepRecord::Phases::sample},
    {"record", &StepRecord::Phases::record},           {"other", &StepRecord::Phases::other}};

// The decode steps of one policy after the warm-up.
struct Steps {
  StepRecord::Phases sum;
  std::vector<double> seconds;  // of each, engine's bookkeeping between steps included
  HeadStepCounts counts;
  size_t seen = 0;
  void add(const StepRecord& r, double wall) {
    for (const Phase& p : kPhases) sum.*p.seconds += r.phase_seconds.*p.seconds;
    sum.other += std::max(0.0, wall - r.seconds);
    seconds.push_back(wall);
    counts.add(r.counts);
  }
};

struct ContextResult {
  int64_t tokens = 0;
  PrefillRecord prefill;
  uint64_t peak_rss_bytes = 0;  // of this process since its start
  std::map<Policy, Steps> steps;
  std::map<Policy, Completion> completions;
};

// Largest resident memory of this process so far, the shared memory that it touched included.
uint64_t peak_rss_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word)
    if (word == "VmHWM:") {
      uint64_t kib = 0;
      status >> kib;
      return kib << 10;
    }
  return 0;
}

std::vector<int32_t> prompt_of(const LoadedModel& model, const std::string& text, int64_t tokens) {
  // A token is seldom more than eight bytes long.
  std::vector<int32_t> prompt =
      model.tokenizer->encode(text.substr(0, size_t(tokens) * 8), true, SpecialInText::AsText);
  CERTKV_EXPECT(
      int64_t(prompt.size()) >= tokens, InvalidArgument,
      "the text has {} tokens, a context of {} was asked for: name a longer one with --text",
      prompt.size(), tokens);
  prompt.resize(size_t(tokens));
  return prompt;
}

struct Bench {
  JobOptions job;
  LoadedModel model;
  std::string text;
  int64_t warmup = 0;
  std::unique_ptr<EngineSetup> setup;

  ContextResult run(int64_t tokens) {
    Request request;
    request.prompt = prompt_of(model, text, tokens);
    request.sampling = job.sampling;
    request.policy = job.policy;
    request.tolerance = job.tolerance;
    request.compare = job.compare;
    ContextResult result;
    result.tokens = tokens;
    std::optional<StepRecord> record;
    setup->engine->on_prefill = [&](const PrefillRecord& r) {
      result.prefill = r;
      result.peak_rss_bytes = peak_rss_bytes();
    };
    setup->engine->on_step = [&](const StepRecord& r) { record = r; };
    setup->engine->on_completion = [&](Completion&& c) {
      result.completions[c.policy] = std::move(c);
    };
    setup->engine->submit(std::move(request));
    for (;;) {
      record.reset();
      const auto start = Clock::now();
      if (!setup->engine->step(false)) break;
      const double wall = std::chrono::duration<double>(Clock::now() - start).count();
      if (!record) continue;
      Steps& steps = result.steps[record->policy];
      if (int64_t(steps.seen++) >= warmup) steps.add(*record, wall);
    }
    for (const auto& [policy, c] : result.completions)
      CERTKV_EXPECT(!c.failed, Uncertifiable, "policy {}: {}: {}", policy_name(policy),
                    c.error_kind, c.error);
    CERTKV_EXPECT(!result.completions.empty(), Uncertifiable, "the engine ended without an answer");
    return result;
  }
};

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x.empty() ? 0 : x[x.size() / 2];
}

void print_prefill(const ContextResult& r, const ModelConfig& config, double peak) {
  const PrefillRecord& p = r.prefill;
  const PrefillWork work = prefill_work(config, r.tokens);
  fmt::print(
      "\nprefill of {} tokens: {:.2f} s, {:.0f} tokens/s; {:.1f} GFLOP/s in all, {:.1f} % of "
      "OpenBLAS's {:.1f}; peak of resident memory {:.1f} MB\n",
      r.tokens, p.seconds, double(r.tokens) / p.seconds,
      (work.products + work.attention) / p.seconds * 1e-9,
      100 * (work.products + work.attention) / p.seconds * 1e-9 / peak, peak,
      double(r.peak_rss_bytes) / 1e6);
  const auto row = [&](const char* name, double seconds, double flops) {
    fmt::print("  {:<12} {:9.3f} s {:6.1f} %", name, seconds, 100 * seconds / p.seconds);
    if (flops > 0)
      fmt::print("  {:8.1f} GFLOP/s, {:5.1f} % of OpenBLAS's", flops / seconds * 1e-9,
                 100 * flops / seconds * 1e-9 / peak);
    fmt::print("\n");
  };
  row("projections", p.projections, work.products);
  row("attention", p.attention, work.attention);
  row("store", p.store, 0);
  row("communicate", p.communicate, 0);
  row("other", p.other, 0);
}

void print_steps(Policy policy, const Steps& s, int64_t context) {
  double all = 0;
  for (double x : s.seconds) all += x;
  const auto n = double(s.seconds.size());
  fmt::print(
      "\ndecode at {} tokens, policy {}: {} steps of {:.3f} ms (median {:.3f}), {:.1f} tokens/s\n",
      context, policy_name(policy), s.seconds.size(), all / n * 1e3, median(s.seconds) * 1e3,
      n / all);
  for (const Phase& p : kPhases)
    fmt::print("  {:<12} {:9.3f} ms {:6.1f} %\n", p.name, s.sum.*p.seconds / n * 1e3,
               100 * s.sum.*p.seconds / all);
  fmt::print("  head-steps at rung 0/1/2/3/4:");
  for (size_t i = 0; i < s.counts.rungs.size(); ++i)
    fmt::print("{} {:.2f}", i == 0 ? "" : " /",
               100 * double(s.counts.rungs[i]) / double(s.counts.head_steps));
  fmt::print(" %\n");
}

Json prefill_json(const ContextResult& r, const ModelConfig& config, double peak) {
  const PrefillRecord& p = r.prefill;
  const PrefillWork work = prefill_work(config, r.tokens);
  Json v;
  v["context"] = r.tokens;
  v["seconds"] = p.seconds;
  v["phase_seconds"] = {{"projections", p.projections},
                        {"attention", p.attention},
                        {"store", p.store},
                        {"communicate", p.communicate},
                        {"other", p.other}};
  v["products_gflops"] = work.products / p.projections * 1e-9;
  v["attention_gflops"] = work.attention / p.attention * 1e-9;
  v["sgemm_peak_gflops"] = peak;
  v["share_of_peak"] = (work.products + work.attention) / p.seconds * 1e-9 / peak;
  v["peak_rss_bytes"] = r.peak_rss_bytes;
  return v;
}

Json steps_json(Policy policy, const Steps& s, int64_t context) {
  double all = 0;
  for (double x : s.seconds) all += x;
  const auto n = double(s.seconds.size());
  Json v;
  v["context"] = context;
  v["policy"] = policy_name(policy);
  v["steps"] = s.seconds.size();
  v["step_us"] = all / n * 1e6;
  v["step_median_us"] = median(s.seconds) * 1e6;
  v["tokens_per_second"] = n / all;
  for (const Phase& p : kPhases) v["phase_us"][p.name] = s.sum.*p.seconds / n * 1e6;
  for (const Phase& p : kPhases) v["share"][p.name] = s.sum.*p.seconds / all;
  for (size_t i = 0; i < s.counts.rungs.size(); ++i)
    v["rungs"][std::to_string(i)] = s.counts.rungs[i];
  return v;
}

int bench_engine(const std::vector<std::string>& values, bool decode) {
  const char* name = decode ? "decode" : "prefill";
  Bench bench;
  bench.job.model.path = "reader";
  std::string contexts = decode ? "32768" : "8192,16384,32768", source = kDemoTextFolder, json;
  int64_t tokens = 32;
  bench.warmup = 8;
  OptionTable table(bench.job, {"model", "policy", "compare", "tolerance", "cache", "paper",
                                "ladder", "skip", "scratch", "store", "parallel", "deterministic"});
  table.add(
      "context", &contexts,
      {.meaning = "tokens of the prompt, with commas between; in ascending order, or the peak of "
                  "memory is that of a longer one",
       .unit = "tokens",
       .cost = "time of the prefill"});
  table.add("text", &source, {.meaning = "file or folder of text for the prompt"});
  if (decode) {
    table.add("tokens", &tokens,
              {.meaning = "decode steps that are measured, under each policy",
               .unit = "steps",
               .min = 1,
               .max = 1e6});
    table.add("warmup", &bench.warmup,
              {.meaning = "decode steps before them, in which F is learned",
               .unit = "steps",
               .min = 0,
               .max = 1e6});
  }
  table.add("threads", &bench.job.parallel.threads,
            {.meaning = "of this process; 0: one per core", .min = 0, .max = 1024});
  table.add("json", &json, {.meaning = "file to write the figures to"});
  const auto parsed = table.read_arguments(values);
  if (parsed.help) {
    fmt::print("usage: certkv bench {} --model FOLDER [--context N,...] [--json FILE]\n\n{}", name,
               table.help());
    return kExitDone;
  }
  JobOptions& job = bench.job;
  CERTKV_EXPECT(job.parallel.tensor <= 1 && job.parallel.data <= 1, InvalidArgument,
                "certkv bench {} runs in one process: parallel.tensor and parallel.data must be 1",
                name);
  table.resolve_paths();
  if (!decode) job.compare.clear();
  job.sampling.max_tokens =
      decode ? bench.warmup + tokens + 1 : 1;  // the first comes from the prefill
  bench.model = load_model(job, 1);
  // Nothing but the asked number of steps ends the answer.
  auto config = std::make_shared<ModelConfig>(*bench.model.config);
  config->eos_ids.clear();
  bench.model.config = config;
  bench.model.chat = ChatTemplate(ChatTemplate::Style::Unknown);
  bench.text = read_demo_text(source);
  std::vector<int64_t> lengths = split_numbers(contexts, "context", 1);
  for (const int64_t n : lengths)
    CERTKV_EXPECT(n + job.sampling.max_tokens <= bench.model.token_limit, InvalidArgument,
                  "a context of {} tokens and {} decode steps pass the model's limit of {}", n,
                  job.sampling.max_tokens, bench.model.token_limit);

  const auto world = LocalWorld::create(1);
  const auto group = world->communicator(0);
  const Topology topology = gather_topology(*group, std::chrono::seconds(5));
  const int threads = job.parallel.threads > 0 ? job.parallel.threads : topology.threads;
  const int forks = std::max(1, int(job.compare.size()));
  const RequestShape shape{*std::max_element(lengths.begin(), lengths.end()),
                           job.sampling.max_tokens, forks};
  bench.setup = std::make_unique<EngineSetup>(set_up_engine(
      job, bench.model, *group, *group, topology, arena_demand(job, *config, 1, 1, {&shape, 1})));
  const Machine machine = inspect_machine();
  double peak = 0;
  {
    ThreadPool pool(threads);
    peak = sgemm_peak_gflops(kPeakMatrix, kPeakRepeats, pool);
  }
  fmt::print(
      "{}, {} threads, OpenBLAS's code for {}; model {}: {} layers, {} query heads over {} KV "
      "heads "
      "of {}; originals on this node, one process\n",
      machine.cpu, threads, blas_core(), job.model.path, config->layers, config->heads,
      config->kv_heads, config->head_dim);
  Json report;
  report["machine"] = machine_json(machine, threads);
  report["model"] = job.model.path;
  report["layout"] = job.cache.layout;
  report["prefill"] = Json::array();
  report["decode"] = Json::array();
  for (const int64_t n : lengths) {
    fmt::print(stderr, "reading {} tokens ...\n", n);
    const ContextResult r = bench.run(n);
    print_prefill(r, *config, peak);
    report["prefill"].push_back(prefill_json(r, *config, peak));
    if (decode)
      for (const auto& [policy, steps] : r.steps) {
        print_steps(policy, steps, n);
        report["decode"].push_back(steps_json(policy, steps, n));
      }
    std::fflush(stdout);
  }
  if (!json.empty()) write_file_atomically(json, report.dump(2) + "\n");
  return kExitDone;
}

}  // namespace

int bench_decode_command(const std::vector<std::string>& values) {
  if (asks_for_device(values)) return bench_device_command(true, values);
  return bench_engine(values, true);
}

int bench_prefill_command(const std::vector<std::string>& values) {
  return bench_engine(values, false);
}

}  // namespace certkv
