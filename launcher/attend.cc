// certkv attend: one certified attention step on the user's own tensors.
#include "runtime/attend_file.h"

#include <fmt/core.h>

#include "launcher/commands.h"
#include "runtime/options_io.h"

namespace certkv {

int attend_command(Args& args) {
  JobOptions job;
  std::string input, output, dtype = "bfloat16";
  OptionTable table(job, {"policy", "tolerance", "cache", "paper", "ladder"});
  table.add("input", &input, {.meaning = "safetensors file with q [query_heads, head_dim] and k, v "
                                         "[kv_heads, tokens, head_dim], after RoPE"});
  table.add("output", &output, {.meaning = "safetensors file to write: o, bound, outcome, rung, ..."});
  table.add("dtype", &dtype,
            {.meaning = "type that F32 keys and values are rounded to; they are the originals then",
             .allowed = "bfloat16 float16"});
  uint64_t seed = 0;
  table.add("seed", &seed, {.meaning = "of exploration (ladder.exploration)"});
  const auto parsed = table.read_arguments(args.values);
  if (parsed.help) {
    fmt::print("usage: certkv attend --input IN.safetensors --output OUT.safetensors "
               "[--policy P] [--tolerance-relative X] [--layout L]\n\n{}",
               table.help());
    return kExitDone;
  }
  CERTKV_EXPECT(!input.empty() && !output.empty(), InvalidArgument,
                "command line: name both files: certkv attend --input IN.safetensors --output "
                "OUT.safetensors");
  AttendFileOptions options;
  options.input = input;
  options.output = output;
  options.dtype = dtype == "float16" ? DType::F16 : DType::BF16;
  options.policy = job.policy;
  options.tolerance = job.tolerance;
  options.cache = job.cache;
  options.paper = job.paper;
  options.ladder = job.ladder;
  options.seed = seed;
  const AttendFileResult r = attend_file(options);
  fmt::print("{}: {} query heads over {} KV heads, {} tokens, head_dim {}\n", output, r.query_heads,
             r.kv_heads, r.tokens, r.head_dim);
  fmt::print("policy {}, tolerance {} {}, layout {} ({:.1f} bytes per token and KV head, dense {})\n",
             policy_name(job.policy), job.tolerance.is_relative ? "relative" : "absolute",
             job.tolerance.value, job.cache.layout, r.bytes_per_token, 4 * r.head_dim);
  fmt::print("certified {}, exact {}, over {}, failed {}; rungs", r.outcomes[0], r.outcomes[1],
             r.outcomes[3], r.outcomes[2]);
  for (int i = 0; i < kRungs; ++i) fmt::print(" {}: {}", i, r.rungs[size_t(i)]);
  fmt::print("\nworst returned bound {:.4g}, relative {:.4g}\n", r.bound_max, r.relative_max);
  const bool enforced = job.policy == Policy::Budget || job.policy == Policy::Dense;
  if (r.outcomes[2] > 0 || (enforced && r.outcomes[3] > 0)) return kExitNo;
  return kExitDone;
}

}  // namespace certkv
