// certkv bench attention and bench decode on a device: certified and dense, in one run.
#include <fmt/core.h>

#include <nlohmann/json.hpp>

#include "launcher/bench.h"
#include "parallel/topology.h"
#include "runtime/bench/device_bench.h"
#include "runtime/options_io.h"
#include "runtime/output_file.h"

namespace certkv {
namespace {

using Json = nlohmann::ordered_json;

void print_times(const char* what, const Timing& certified, const Timing& dense) {
  fmt::print("  {:<28} {:10.1f} us {:5.1f} %  {:10.1f} us {:5.1f} %  {:8.3f}\n", what, certified.us,
             100 * certified.spread, dense.us, 100 * dense.spread, certified.us / dense.us);
}

void print_case(const DeviceBenchResult& r, const DeviceBenchOptions& o) {
  fmt::print("\n{} tokens, batch {}, {} query heads over {} KV heads of {}, {} layers, heads {}\n",
             o.context, o.batch, o.query_heads, o.kv_heads, o.head_dim, o.layers,
             head_kind_name(o.heads));
  fmt::print("  {:<28} {:>13} {:>7}  {:>13} {:>7}  {:>8}\n", "", "certified", "spread", "dense",
             "spread", "ratio");
  print_times("attention, a layer", r.certified_attention, r.dense_attention);
  print_times("what it adds to a layer", r.certified_added, r.dense_added);
  fmt::print("  {:<28} {:10.1f} us alone\n", "its output projection", r.projection.us);
  if (o.whole_steps) {
    print_times("decode step, to its logits", r.certified_step, r.dense_step);
    fmt::print("  verdicts read and counted    {:10.1f} us after each certified step\n",
               r.bookkeeping.us);
  }
  uint64_t all = 0;
  for (uint64_t n : r.rungs) all += n;
  fmt::print("  head-steps at rung 0/1/2/3:");
  for (size_t i = 0; i < 4; ++i)
    fmt::print("{} {:.2f}", i == 0 ? "" : " /", 100 * double(r.rungs[i]) / double(all));
  fmt::print(" %; neither certified nor exact: {}\n", r.over_tolerance);
  fmt::print("  F {:.1f}, X {:.1f} blocks per KV head; {:.2f} promoted a step, hit rate {:.1f} %\n",
             r.f_blocks, r.x_blocks, r.promoted, 100 * r.hits / (r.hits + r.promoted));
  fmt::print(
      "  paged {:.0f} bytes a step; tier 1 {:.3f}, with the scratch in use {:.3f} of dense\n",
      r.paged_bytes, r.tier1_bytes / r.dense_bytes,
      (r.tier1_bytes + r.scratch_bytes) / r.dense_bytes);
}

Json case_json(const DeviceBenchResult& r, const DeviceBenchOptions& o) {
  Json v;
  v["backend"] = o.backend;
  v["device"] = r.device;
  v["context"] = o.context;
  v["batch"] = o.batch;
  v["layers"] = o.layers;
  v["query_heads"] = o.query_heads;
  v["kv_heads"] = o.kv_heads;
  v["head_dim"] = o.head_dim;
  v["heads"] = head_kind_name(o.heads);
  v["quantization"] = o.int8 ? "int8" : "none";
  v["tolerance"] = o.tolerance.value;
  v["tolerance_kind"] = o.tolerance.is_relative ? "relative" : "absolute";
  v["steps"] = o.steps;
  v["certified_us"] = r.certified_attention.us;
  v["dense_us"] = r.dense_attention.us;
  v["certified_added_us"] = r.certified_added.us;
  v["dense_added_us"] = r.dense_added.us;
  v["projection_us"] = r.projection.us;
  v["spreads"] = {{"certified", r.certified_attention.spread},
                  {"dense", r.dense_attention.spread},
                  {"certified_added", r.certified_added.spread},
                  {"dense_added", r.dense_added.spread}};
  if (o.whole_steps) {
    v["certified_step_us"] = r.certified_step.us;
    v["dense_step_us"] = r.dense_step.us;
    v["bookkeeping_us"] = r.bookkeeping.us;
    v["spreads"]["certified_step"] = r.certified_step.spread;
    v["spreads"]["dense_step"] = r.dense_step.spread;
  }
  for (size_t i = 0; i < r.rungs.size(); ++i) v["rungs"][std::to_string(i)] = r.rungs[i];
  v["over_tolerance"] = r.over_tolerance;
  v["f_blocks"] = r.f_blocks;
  v["x_blocks"] = r.x_blocks;
  v["promoted_blocks"] = r.promoted;
  v["scratch_hits"] = r.hits;
  v["paged_bytes"] = r.paged_bytes;
  v["read_bytes"] = r.read_bytes;
  v["tier1_bytes"] = r.tier1_bytes;
  v["scratch_bytes"] = r.scratch_bytes;
  v["dense_bytes"] = r.dense_bytes;
  return v;
}

}  // namespace

int bench_device_command(bool whole_steps, const std::vector<std::string>& values) {
  JobOptions job;
  DeviceBenchOptions o;
  o.whole_steps = whole_steps;
  o.threads = usable_cores();
  std::string contexts = "32768", heads = "mixed", dtype = "bfloat16", quantization = "none", json;
  OptionTable table(job, {"tolerance", "ladder", "scratch"});
  table.add("backend", &o.backend,
            {.meaning = "whose kernels are measured; emulated: on the CPU, to test",
             .allowed = "cuda emulated"});
  table.add("context", &contexts,
            {.meaning = "tokens, with commas between", .unit = "tokens", .cost = "memory, time"});
  table.add("batch", &o.batch, {.meaning = "sequences of a step", .min = 1, .max = 256});
  table.add("layers", &o.layers, {.meaning = "of the model", .min = 1, .max = 1024});
  table.add("query_heads", &o.query_heads, {.meaning = "of a layer", .min = 1, .max = 1024});
  table.add("kv_heads", &o.kv_heads, {.meaning = "of a layer", .min = 1, .max = 1024});
  table.add("head_dim", &o.head_dim, {.meaning = "64 or 128", .min = 64, .max = 128});
  table.add("hidden", &o.hidden, {.meaning = "width of the model", .min = 64, .max = 1e5});
  table.add("intermediate", &o.intermediate,
            {.meaning = "width of its MLP", .min = 64, .max = 1e6});
  table.add("vocab", &o.vocab, {.meaning = "tokens it knows", .min = 64, .max = 1e7});
  table.add("steps", &o.steps, {.meaning = "measured", .cost = "time", .min = 1, .max = 1000});
  table.add("warmup", &o.warmup, {.meaning = "steps before them", .min = 2, .max = 1000});
  table.add(
      "heads", &heads,
      {.meaning = "how concentrated the synthetic heads are", .allowed = "diffuse mixed sharp"});
  table.add("dtype", &dtype,
            {.meaning = "of weights and originals", .allowed = "bfloat16 float16"});
  table.add("quantization", &quantization,
            {.meaning = "of the layers' matrices, in whole steps", .allowed = "none int8"});
  table.add("threads", &o.threads, {.meaning = "of the host", .min = 1, .max = 1024});
  table.add("seed", &o.seed, {.meaning = "of the synthetic heads"});
  table.add("json", &json, {.meaning = "file to write the figures to"});
  const auto parsed = table.read_arguments(values);
  if (parsed.help) {
    fmt::print(
        "usage: certkv bench {} --backend cuda [--context N,...] [--batch N] [--json FILE]\n"
        "the shape is that of Llama-3.1-8B unless said otherwise; weights are random\n\n{}",
        whole_steps ? "decode" : "attention", table.help());
    return kExitDone;
  }
  o.heads = head_kind_from_name(heads);
  o.dtype = dtype == "float16" ? DType::F16 : DType::BF16;
  o.int8 = quantization == "int8";
  o.tolerance = job.tolerance;
  o.ladder = job.ladder;
  o.scratch = job.scratch;
  Json report;
  report["machine"] = machine_json(inspect_machine(), o.threads);
  report["cases"] = Json::array();
  for (const int64_t context : split_numbers(contexts, "context", 1024)) {
    o.context = context;
    const DeviceBenchResult r = bench_device(
        o, [&](const std::string& what) { fmt::print(stderr, "{} tokens: {}\n", context, what); });
    if (report["cases"].empty()) fmt::print("{}, {} threads\n", r.device, o.threads);
    print_case(r, o);
    report["cases"].push_back(case_json(r, o));
  }
  if (!json.empty()) write_file_atomically(json, report.dump(2) + "\n");
  return kExitDone;
}

}  // namespace certkv
