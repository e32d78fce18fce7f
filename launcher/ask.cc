// certkv ask: one question about one text, in this process alone: the smallest way to see it work.
#include <fmt/core.h>

#include <fstream>
#include <iterator>
#include <optional>

#include "launcher/commands.h"
#include "parallel/communicator.h"
#include "parallel/local_world.h"
#include "parallel/topology.h"
#include "runtime/engine_setup.h"
#include "runtime/options_io.h"
#include "runtime/tokenizer.h"

namespace certkv {
namespace {

std::string read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  CERTKV_EXPECT(in.good(), InvalidArgument, "--text {}: the file cannot be read", path);
  std::string text{std::istreambuf_iterator<char>(in), {}};
  CERTKV_EXPECT(!in.bad(), InvalidArgument, "--text {}: reading failed", path);
  return text;
}

// Chat models get a user's message; plain ones a text that ends in the question, which they continue.
std::vector<int32_t> make_prompt(const LoadedModel& model, const std::string& text,
                                 const std::string& question) {
  const auto style = model.chat.style();
  if (style == ChatTemplate::Style::Plain || style == ChatTemplate::Style::Unknown)
    return model.tokenizer->encode(
        text + "\n\nQuestions about the text above.\nQ: " + question, true, SpecialInText::AsText);
  return model.chat.encode({{"user", text + "\n\n" + question}}, *model.tokenizer);
}

void print_certificate(const Completion& c, const Tolerance& tolerance) {
  const HeadStepCounts& n = c.counts;
  fmt::print(
      "certificate: {}; {} head-steps: {} certified, {} exact, {} over, {} failed; worst bound {:.4g} "
      "({:.4g} of the values' norm), tolerance {} {}\n",
      outcome_name(c.outcome), n.head_steps, n.certified, n.exact, n.over, n.failed, c.bound_max,
      c.relative_max, tolerance.is_relative ? "relative" : "absolute", tolerance.value);
  fmt::print("rungs: 0 codes {}, 1 keys {}, 2 values {}, 3 head {}, 4 layer {}\n", n.rungs[0],
             n.rungs[1], n.rungs[2], n.rungs[3], n.rungs[4]);
  fmt::print("KV cache: {:.1f} MB of quantised keys and values, {:.1f} MB dense; {} prompt tokens in "
             "{:.1f} s, {} tokens in {:.2f} s\n",
             double(c.tier1_bytes) / 1e6, double(c.dense_bytes) / 1e6, c.prompt_tokens,
             c.prefill_seconds, c.tokens.size(), c.decode_seconds);
}

}  // namespace

int ask_command(Args& args) {
  JobOptions job;
  job.sampling.stop = {"\n"};
  std::string text, question;
  OptionTable table(job, {"model", "policy", "tolerance", "cache", "paper", "ladder", "skip", "sampling",
                          "scratch", "store", "parallel", "deterministic"});
  table.add("text", &text, {.meaning = "file with the text that the question is about"});
  table.add("question", &question,
            {.meaning = "the question; a model without a chat template continues it"});
  const auto parsed = table.read_arguments(args.values);
  if (parsed.help) {
    fmt::print("usage: certkv ask --model FOLDER --text FILE --question \"...\"\n\n{}", table.help());
    return kExitDone;
  }
  CERTKV_EXPECT(!text.empty() && !question.empty(), InvalidArgument,
                "command line: certkv ask --model FOLDER --text FILE --question \"...\"");
  CERTKV_EXPECT(job.parallel.tensor <= 1 && job.parallel.data <= 1, InvalidArgument,
                "certkv ask runs in one process: parallel.tensor and parallel.data must be 1 (use "
                "mpirun certkv run for more)");
  table.resolve_paths();
  const std::string body = read_text(text);
  const LoadedModel model = load_model(job, 1);
  Request request;
  request.prompt = make_prompt(model, body, question);
  request.sampling = job.sampling;
  request.policy = job.policy;
  request.tolerance = job.tolerance;
  const int64_t prompt = int64_t(request.prompt.size());
  CERTKV_EXPECT(prompt + job.sampling.max_tokens <= model.token_limit, InvalidArgument,
                "the text makes a prompt of {} tokens; with sampling.max_tokens {} the model's limit "
                "of {} is passed: use a shorter text",
                prompt, job.sampling.max_tokens, model.token_limit);

  const auto world = LocalWorld::create(1);
  const auto group = world->communicator(0);
  const Topology topology = gather_topology(*group, std::chrono::seconds(5));
  const RequestShape shape{prompt, job.sampling.max_tokens, 1};
  const EngineSetup setup =
      set_up_engine(job, model, *group, *group, topology,
                    arena_demand(job, *model.config, 1, 1, {&shape, 1}));
  fmt::print(stderr, "reading {} tokens ...\n", prompt);
  std::optional<Completion> answer;
  setup.engine->on_completion = [&](Completion&& c) { answer = std::move(c); };
  setup.engine->submit(std::move(request));
  while (setup.engine->step(false)) {
  }
  CERTKV_EXPECT(answer.has_value(), Uncertifiable, "the engine ended without an answer");
  if (answer->failed) {
    fmt::print(stderr, "certkv: {}: {}\n", answer->error_kind, answer->error);
    return kExitNo;
  }
  fmt::print("{}\n", answer->text);
  print_certificate(*answer, job.tolerance);
  const bool enforced = job.policy == Policy::Budget || job.policy == Policy::Dense;
  return answer->outcome == Outcome::Over && enforced ? kExitNo : kExitDone;
}

}  // namespace certkv
