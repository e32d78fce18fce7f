// certkv bench classes: what the precision classes read, beside the fixed layouts.
#include <fmt/core.h>

#include <charconv>
#include <nlohmann/json.hpp>

#include "launcher/bench.h"
#include "parallel/communicator.h"
#include "parallel/local_world.h"
#include "parallel/topology.h"
#include "runtime/certify/head_class.h"
#include "runtime/demo_batch.h"
#include "runtime/engine_setup.h"
#include "runtime/options_io.h"
#include "runtime/output_file.h"
#include "runtime/tokenizer.h"

namespace certkv {
namespace {

using Json = nlohmann::ordered_json;

struct Case {
  int64_t context = 0;
  double tolerance = 0;
  std::string layout;
  HeadStepCounts steady, all;
  uint64_t steady_steps = 0;
  std::array<uint64_t, kClasses> classes{};  // of the last steps, over the questions
  uint64_t right = 0, questions = 0;
};

std::vector<double> split_tolerances(const std::string& text) {
  std::vector<double> out;
  for (const std::string& word : split_list(text, "tolerance")) {
    double x = 0;
    const auto [at, error] = std::from_chars(word.data(), word.data() + word.size(), x);
    CERTKV_EXPECT(
        error == std::errc() && at == word.data() + word.size() && x >= 0 && x <= kMaxTolerance,
        InvalidArgument,
        "command line: tolerance is '{}': numbers from 0 on, with commas between, are "
        "needed",
        text);
    out.push_back(x);
  }
  return out;
}

double share(uint64_t a, uint64_t b) {
  return b == 0 ? 0 : double(a) / double(b);
}

Json case_json(const Case& c) {
  Json v;
  v["context"] = c.context;
  v["tolerance"] = c.tolerance;
  v["layout"] = c.layout;
  v["bytes_read_per_token"] = share(c.steady.read_bytes, c.steady.attended_tokens);
  v["bytes_read_share"] = share(c.steady.read_bytes, c.steady.dense_bytes);
  for (size_t r = 0; r < c.steady.rungs.size(); ++r)
    v["rungs"][std::to_string(r)] = c.steady.rungs[r];
  v["hit_rate"] = share(c.steady.scratch_hits, c.steady.scratch_hits + c.steady.scratch_misses);
  v["promoted_per_head_step"] =
      share(c.steady.promoted_keys + c.steady.promoted_values, c.steady.head_steps);
  for (int i = 0; i < kClasses; ++i) v["classes"][class_label(i)] = c.classes[size_t(i)];
  v["certified"] = c.all.certified;
  v["exact"] = c.all.exact;
  v["head_steps"] = c.all.head_steps;
  v["right"] = c.right;
  v["questions"] = c.questions;
  return v;
}

void print_case(const Case& c) {
  std::string classes;
  for (int i = 0; i < kClasses; ++i)
    if (c.classes[size_t(i)] != 0)
      classes += fmt::format(" {}:{}", class_label(i), c.classes[size_t(i)]);
  const bool all = c.all.certified + c.all.exact == c.all.head_steps;
  fmt::print("{:>7} {:>9} {:<9} {:6.3f}  {:6.2f} {:6.2f}  {:6.3f}  {:8.3f}  {:>4}/{:<4} {:<4}{}\n",
             c.context, c.tolerance, c.layout, share(c.steady.read_bytes, c.steady.dense_bytes),
             100 * share(c.steady.rungs[0], c.steady.head_steps),
             100 * share(c.steady.rungs[3], c.steady.head_steps),
             share(c.steady.scratch_hits, c.steady.scratch_hits + c.steady.scratch_misses),
             share(c.steady.promoted_keys + c.steady.promoted_values, c.steady.head_steps), c.right,
             c.questions, all ? "yes" : "NO", classes);
  std::fflush(stdout);
}

// Decodes the questions one after the other under one layout, tolerance and policy.
Case decode(Engine& engine, const LoadedModel& model, const std::vector<DemoQuestion>& questions,
            int64_t steps, int64_t warmup, Policy policy, double tolerance) {
  Case c;
  c.tolerance = tolerance;
  for (const DemoQuestion& question : questions) {
    Request request;
    request.prompt = model.tokenizer->encode(question.prompt, true, SpecialInText::AsText);
    request.sampling.max_tokens = steps + 1;  // the first comes from the prefill
    request.policy = policy;
    request.tolerance = {.is_relative = true, .value = tolerance};
    int64_t seen = 0;
    std::array<uint64_t, kClasses> classes{};
    engine.on_step = [&](const StepRecord& r) {
      c.all.add(r.counts);
      classes = r.classes;
      if (seen++ < warmup) return;
      c.steady.add(r.counts);
      ++c.steady_steps;
    };
    engine.on_completion = [&](Completion&& done) {
      CERTKV_EXPECT(!done.failed, Uncertifiable, "{}: {}", done.error_kind, done.error);
      ++c.questions;
      c.right += answer_is_right(done.text, question.expected) ? 1 : 0;
    };
    engine.submit(std::move(request));
    while (engine.step(false)) {
    }
    for (size_t i = 0; i < classes.size(); ++i) c.classes[i] += classes[i];
  }
  return c;
}

}  // namespace

int bench_classes_command(const std::vector<std::string>& values) {
  JobOptions job;
  job.model.path = "reader";
  std::string contexts = "4096,16384,32768", tolerances = "0.05,0.02,0.01", json,
              layouts = "compact,balanced,paper,k12v8,classes", source = kDemoTextFolder;
  int64_t steps = 64, warmup = 64, questions = 2;
  OptionTable table(job, {"model", "ladder", "skip", "scratch", "store", "parallel"});
  table.add("context", &contexts,
            {.meaning = "tokens of prompt and answer, with commas between", .unit = "tokens"});
  table.add("tolerance", &tolerances, {.meaning = "relative tolerances, with commas between"});
  table.add("layout", &layouts, {.meaning = "tier-1 layouts, with commas between"});
  table.add("questions", &questions,
            {.meaning = "per context, one prompt for each", .min = 1, .max = 1e6});
  table.add("tokens", &steps,
            {.meaning = "decode steps of each question that are measured", .min = 1, .max = 1e6});
  table.add("warmup", &warmup,
            {.meaning = "decode steps before them, in which F is learned and classes are revised",
             .min = 0,
             .max = 1e6});
  table.add("text", &source, {.meaning = "file or folder of text for the prompts"});
  table.add("threads", &job.parallel.threads,
            {.meaning = "of this process; 0: one per core", .min = 0, .max = 1024});
  table.add("json", &json, {.meaning = "file to write the figures to"});
  const auto parsed = table.read_arguments(values);
  if (parsed.help) {
    fmt::print("usage: certkv bench classes --model FOLDER [--context N,...] [--json FILE]\n\n{}",
               table.help());
    return kExitDone;
  }
  CERTKV_EXPECT(job.parallel.tensor <= 1 && job.parallel.data <= 1, InvalidArgument,
                "certkv bench classes runs in one process: parallel.tensor and parallel.data must "
                "be 1");
  table.resolve_paths();
  const std::vector<int64_t> lengths = split_numbers(contexts, "context", 1);
  const std::vector<double> asked = split_tolerances(tolerances);
  const std::vector<std::string> names = split_list(layouts, "layout");
  LoadedModel model = load_model(job, 1);
  auto config = std::make_shared<ModelConfig>(*model.config);
  config->eos_ids.clear();  // nothing but the asked number of steps ends an answer
  model.config = config;
  model.chat = ChatTemplate(ChatTemplate::Style::Unknown);
  for (const std::string& name : names) {
    CacheOptions cache = job.cache;
    cache.layout = name;
    largest_page_format(cache, int(config->head_dim));
  }
  const std::string text = read_demo_text(source);
  const int64_t decoded = warmup + steps + 1;
  int64_t longest = 0;
  for (const int64_t n : lengths) {
    CERTKV_EXPECT(n > decoded && n <= model.token_limit, InvalidArgument,
                  "context is {}: more than the {} decoded tokens, and at most the model's limit "
                  "of {}, are needed",
                  n, decoded, model.token_limit);
    longest = std::max(longest, n);
  }
  const auto world = LocalWorld::create(1);
  const auto group = world->communicator(0);
  const Topology topology = gather_topology(*group, std::chrono::seconds(5));
  const int threads = job.parallel.threads > 0 ? job.parallel.threads : topology.threads;
  const Machine machine = inspect_machine();
  fmt::print("{}, {} threads; model {}: {} layers, {} query heads over {} KV heads of {}\n",
             machine.cpu, threads, job.model.path, config->layers, config->heads, config->kv_heads,
             config->head_dim);
  fmt::print(
      "context tolerance layout     share  rung 0 rung 3     hit  promoted  right     held "
      "classes\n"
      "                            of FP16      %      %    rate  per head-step\n");
  Json report;
  report["machine"] = machine_json(machine, threads);
  report["model"] = job.model.path;
  report["cases"] = Json::array();
  report["dense"] = Json::array();
  const RequestShape shape{longest, decoded, 1};
  bool dense_done = false;
  for (const std::string& name : names) {
    job.cache.layout = name;
    EngineSetup setup = set_up_engine(job, model, *group, *group, topology,
                                      arena_demand(job, *config, 1, 1, {&shape, 1}));
    for (const int64_t n : lengths) {
      DemoBatchOptions batch = demo_defaults("reader");
      batch.contexts = {n - decoded};
      batch.questions = questions;
      const std::vector<DemoQuestion> asks = make_demo_batch(text, batch);
      if (!dense_done) {
        const Case dense =
            decode(*setup.engine, model, asks, steps + warmup, warmup, Policy::Dense, 0);
        fmt::print("{:>7} dense: {} of {} answers right\n", n, dense.right, dense.questions);
        report["dense"].push_back(
            {{"context", n}, {"right", dense.right}, {"questions", dense.questions}});
      }
      for (const double tolerance : asked) {
        Case c =
            decode(*setup.engine, model, asks, steps + warmup, warmup, Policy::Budget, tolerance);
        c.context = n;
        c.layout = name;
        print_case(c);
        report["cases"].push_back(case_json(c));
      }
    }
    dense_done = true;
  }
  if (!json.empty()) write_file_atomically(json, report.dump(2) + "\n");
  return kExitDone;
}

}  // namespace certkv
