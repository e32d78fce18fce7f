// certkv bench attention: one layer's decode attention, as a table and as JSON.
#include <fmt/core.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "launcher/bench.h"
#include "parallel/topology.h"
#include "runtime/bench/attention_bench.h"
#include "runtime/byte_size.h"
#include "runtime/host_memory.h"
#include "runtime/options_io.h"
#include "runtime/output_file.h"

namespace certkv {
namespace {

using Json = nlohmann::ordered_json;

void print_row(const char* what, const Timing& t, double bytes, const AttentionCase& c) {
  std::string moved = fmt::format("{:35}", "");
  if (bytes > 0) {
    const double gbps = bytes / t.us * 1e-3;
    moved = fmt::format("{:8.2f} {:8.2f} {:8.2f} {:8.2f}", bytes / 1e6, gbps,
                        gbps / c.best_copy_gbps(), gbps / c.read_gbps);
  }
  fmt::print("  {:<34} {:10.1f} {:6.1f} % {} {:8.3f}\n", what, t.us, 100 * t.spread, moved,
             t.us / c.dense.us);
}

void print_case(const AttentionCase& c, const AttentionBenchOptions& o) {
  fmt::print(
      "\n{} tokens, layout {} ({:.1f} bytes per token and KV head; originals {}), {} query heads "
      "over "
      "{} KV heads of {}, batch {}, heads {}\n",
      c.context, c.layout, c.bytes_per_token, 4 * o.head_dim, o.query_heads, o.kv_heads, o.head_dim,
      o.batch, head_kind_name(o.heads));
  fmt::print("{} rotating sets ({} KV heads each) of {} tokens\n", c.sets, o.batch * o.kv_heads,
             c.tokens);
  fmt::print("  {:<34} {:>10} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}\n", "", "us", "spread", "MB",
             "GB/s", "of copy", "of read", "/ dense");
  print_row("dense", c.dense, c.dense_bytes, c);
  print_row("dense, originals' digests checked", c.dense_verified, 0, c);
  print_row("certified, steady", c.certified, c.certified_bytes, c);
  print_row("  its pass alone", c.pass, c.certified_bytes, c);
  if (c.uncertified_pass)
    print_row("  pass without certificate", *c.uncertified_pass, c.certified_bytes, c);
  print_row("certified, cold", c.cold, 0, c);
  print_row("certified, 5 % at rung 3", c.ladder, 0, c);
  print_row("correction of 16 blocks, one head", c.correction, 0, c);
  print_row("  of it: read back and verified", c.correction_read, 0, c);
  print_row("  of it: the canary", c.correction_canary, 0, c);
  print_row("policy paper", c.paper, 0, c);
  print_row("policy naive", c.naive, 0, c);
  if (const auto share = c.certificate_share())
    fmt::print("  certificate: {:.1f} % of the pass; ", 100 * *share);
  else
    fmt::print("  certificate: not measured (these kernels always compute it); ");
  fmt::print("correction: {:.1f} % of the pass\n", 100 * c.correction.us / c.pass.us);
  fmt::print(
      "  memory: copy {:.2f} GB/s (plain {:.2f}, streaming {:.2f}; read + written), read {:.2f} "
      "GB/s\n",
      c.best_copy_gbps(), c.copy_gbps, c.copy_streaming_gbps, c.read_gbps);
  uint64_t all = 0;
  for (uint64_t n : c.rungs) all += n;
  fmt::print("  certified steps: rungs 0/1/2/3");
  for (size_t r = 0; r < 4; ++r)
    fmt::print("{} {:.2f}", r == 0 ? "" : " /", 100 * double(c.rungs[r]) / double(all));
  fmt::print(" %; F {:.1f}, X {:.1f} blocks, values of {:.1f} blocks skipped, per KV head\n",
             c.f_blocks, c.x_blocks, c.skipped_blocks);
}

Json case_json(const AttentionCase& c, const AttentionBenchOptions& o) {
  Json v;
  v["backend"] = "cpu";
  v["layout"] = c.layout;
  v["context"] = c.context;
  v["query_heads"] = o.query_heads;
  v["kv_heads"] = o.kv_heads;
  v["head_dim"] = o.head_dim;
  v["batch"] = o.batch;
  v["dense_us"] = c.dense.us;
  v["certified_us"] = c.certified.us;
  v["uncertified_pass_us"] = c.uncertified_pass ? Json(c.uncertified_pass->us) : Json();
  v["cold_us"] = c.cold.us;
  v["correction_us"] = c.correction.us;
  v["paper_us"] = c.paper.us;
  v["naive_us"] = c.naive.us;
  v["copy_gbps"] = c.best_copy_gbps();
  v["dense_gbps"] = c.dense_gbps();
  v["certified_gbps"] = c.certified_gbps();
  v["spread"] = std::max(c.dense.spread, c.certified.spread);
  // Beyond what every reader of this format knows.
  v["pass_us"] = c.pass.us;
  v["ladder_us"] = c.ladder.us;
  v["correction_read_us"] = c.correction_read.us;
  v["correction_canary_us"] = c.correction_canary.us;
  v["dense_verified_us"] = c.dense_verified.us;
  const auto share = c.certificate_share();
  v["certificate_share"] = share ? Json(*share) : Json();
  v["read_gbps"] = c.read_gbps;
  v["copy_plain_gbps"] = c.copy_gbps;
  v["copy_streaming_gbps"] = c.copy_streaming_gbps;
  v["dense_bytes"] = c.dense_bytes;
  v["certified_bytes"] = c.certified_bytes;
  v["bytes_per_token"] = c.bytes_per_token;
  v["tokens"] = c.tokens;
  v["rotating_sets"] = c.sets;
  v["heads"] = head_kind_name(o.heads);
  v["tolerance"] = o.tolerance.value;
  v["tolerance_kind"] = o.tolerance.is_relative ? "relative" : "absolute";
  v["repeats"] = c.steps;
  v["threads"] = o.threads;
  for (size_t r = 0; r < c.rungs.size(); ++r) v["rungs"][std::to_string(r)] = c.rungs[r];
  v["f_blocks"] = c.f_blocks;
  v["skipped_blocks"] = c.skipped_blocks;
  v["x_blocks"] = c.x_blocks;
  v["spreads"] = {{"dense", c.dense.spread},
                  {"certified", c.certified.spread},
                  {"pass", c.pass.spread},
                  {"cold", c.cold.spread},
                  {"correction", c.correction.spread},
                  {"paper", c.paper.spread},
                  {"naive", c.naive.spread},
                  {"ladder", c.ladder.spread},
                  {"dense_verified", c.dense_verified.spread}};
  if (c.uncertified_pass) v["spreads"]["uncertified_pass"] = c.uncertified_pass->spread;
  return v;
}

}  // namespace

int bench_attention_command(const std::vector<std::string>& values) {
  if (asks_for_device(values)) return bench_device_command(false, values);
  JobOptions job;
  AttentionBenchOptions o;
  std::string backend = "cpu", contexts = "32768", cache = "auto", layouts = "compact",
              heads = "mixed", json;
  OptionTable table(job, {"tolerance", "ladder", "skip", "paper", "scratch"});
  table.add(
      "backend", &backend,
      {.meaning = "whose kernels are measured: cpu here; cuda has keys of its own (--backend cuda "
                  "--help)",
       .allowed = "cpu"});
  table.add("context", &contexts,
            {.meaning = "tokens, with commas between", .unit = "tokens", .cost = "memory, time"});
  table.add("layout", &layouts, {.meaning = "tier-1 layouts, with commas between"});
  table.add("query_heads", &o.query_heads, {.meaning = "of the layer", .min = 1, .max = 1024});
  table.add("kv_heads", &o.kv_heads, {.meaning = "of the layer", .min = 1, .max = 1024});
  table.add("head_dim", &o.head_dim, {.meaning = "64, 96, 128 or 256", .min = 64, .max = 256});
  table.add("block_tokens", &o.block_tokens, {.meaning = "16 or 32", .min = 16, .max = 32});
  table.add("batch", &o.batch, {.meaning = "sequences of a step", .min = 1, .max = 256});
  table.add("repeats", &o.repeats,
            {.meaning = "times that everything is measured, in turn",
             .cost = "time",
             .min = 1,
             .max = 1e6});
  o.threads = usable_cores();
  table.add("threads", &o.threads, {.meaning = "of the pool", .min = 1, .max = 1024});
  table.add(
      "heads", &heads,
      {.meaning = "how concentrated the synthetic heads are", .allowed = "diffuse mixed sharp"});
  table.add("seed", &o.seed, {.meaning = "of the synthetic heads"});
  table.add(
      "cache", &cache,
      {.meaning = "last-level cache, which the rotating sets exceed fourfold; auto: as hwloc says",
       .bytes = true});
  table.add("json", &json, {.meaning = "file to write the figures to"});
  const auto parsed = table.read_arguments(values);
  if (parsed.help) {
    fmt::print(
        "usage: certkv bench attention [--context N,...] [--layout L,...] [--json FILE]\n\n{}",
        table.help());
    return kExitDone;
  }
  o.heads = head_kind_from_name(heads);
  o.tolerance = job.tolerance;
  o.ladder = job.ladder;
  o.skip = job.skip;
  o.paper = job.paper;
  o.scratch = job.scratch;
  Machine machine = inspect_machine();
  if (cache != "auto") machine.last_cache_bytes = parse_byte_size(cache).value();  // checked above
  o.cache_bytes = machine.last_cache_bytes;

  struct Asked {
    std::string layout;
    int64_t context;
  };
  std::vector<Asked> asked;
  for (const int64_t context : split_numbers(contexts, "context", 1024))
    for (const std::string& layout : split_list(layouts, "layout")) {
      const uint64_t need = attention_bench_bytes(o, layout, context);
      CERTKV_EXPECT(need <= machine.memory_available_bytes, OutOfMemory,
                    "{} tokens, layout {}: {} of memory are needed, {} are free: ask for shorter "
                    "contexts, fewer heads or a smaller batch",
                    context, layout, byte_size_text(need),
                    byte_size_text(machine.memory_available_bytes));
      asked.push_back({layout, context});
    }
  fmt::print("{}, {} threads, last-level cache {}\n", machine.cpu, o.threads,
             machine.last_cache_bytes > 0 ? byte_size_text(machine.last_cache_bytes) : "unknown");
  Json report;
  report["machine"] = machine_json(machine, o.threads);
  report["cases"] = Json::array();
  for (const auto& [layout, context] : asked) {
    const AttentionCase c = bench_attention(
        o, layout, context, [](const std::string& what) { fmt::print(stderr, "{} ...\n", what); });
    print_case(c, o);
    std::fflush(stdout);
    report["cases"].push_back(case_json(c, o));
  }
  if (!json.empty()) write_file_atomically(json, report.dump(2) + "\n");
  return kExitDone;
}

}  // namespace certkv
