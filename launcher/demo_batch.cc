// certkv demo-batch: questions with known answers, and what a run made of them.
#include <fmt/core.h>

#include <charconv>

#include "launcher/commands.h"
#include "runtime/demo_batch.h"
#include "runtime/options_io.h"

namespace certkv {
namespace {

std::vector<int64_t> parse_contexts(const std::string& text) {
  std::vector<int64_t> contexts;
  for (size_t from = 0; from <= text.size();) {
    const size_t end = std::min(text.find(',', from), text.size());
    int64_t tokens = 0;
    const auto [at, error] = std::from_chars(text.data() + from, text.data() + end, tokens);
    CERTKV_EXPECT(
        error == std::errc() && at == text.data() + end && tokens > 0, InvalidArgument,
        "command line: contexts is '{}': numbers of tokens with commas between are needed", text);
    contexts.push_back(tokens);
    from = end + 1;
  }
  return contexts;
}

}  // namespace

int demo_batch_command(Args& args) {
  std::string model = "reader", output, contexts, text = kDemoTextFolder, score, answers;
  int64_t questions = 0;
  uint64_t seed = 1;
  OptionTable table;
  table.add("model", &model,
            {.meaning = "the demo model that is asked", .allowed = "reader needle"});
  table.add(
      "output", &output,
      {.meaning = "folder for batch.jsonl and answers.jsonl, made if missing", .flags = "out"});
  table.add("contexts", &contexts,
            {.meaning = "tokens of prompt and answer of each document, with commas between; empty: "
                        "the model's own choice",
             .unit = "tokens",
             .cost = "longer prefill"});
  table.add("questions", &questions,
            {.meaning = "prompts per document; 0: the model's own choice",
             .cost = "one prefill for each",
             .min = 0,
             .max = 20});
  table.add("seed", &seed, {.meaning = "of facts, places and questions"});
  table.add("text", &text, {.meaning = "file or folder of English text"});
  table.add("score", &score,
            {.meaning = "output folder of a finished run over such a batch: print its table"});
  table.add("answers", &answers, {.meaning = "answers.jsonl of the batch, with score"});
  const auto parsed = table.read_arguments(args.values);
  if (parsed.help) {
    fmt::print(
        "usage: certkv demo-batch --model reader|needle --output FOLDER\n"
        "       certkv demo-batch --score RUN_FOLDER --answers FOLDER/answers.jsonl\n\n{}",
        table.help());
    return kExitDone;
  }
  if (!score.empty()) {
    CERTKV_EXPECT(!answers.empty(), InvalidArgument,
                  "command line: --score needs --answers, the answers.jsonl of the batch");
    fmt::print("{}", demo_table(score, answers));
    return kExitDone;
  }
  CERTKV_EXPECT(!output.empty(), InvalidArgument,
                "command line: name the folder to write with --output");
  DemoBatchOptions options = demo_defaults(model);
  if (!contexts.empty()) options.contexts = parse_contexts(contexts);
  if (questions > 0) options.questions = questions;
  options.seed = seed;
  const auto batch = make_demo_batch(read_demo_text(text), options);
  write_demo_batch(output, batch, model);
  fmt::print("{}/batch.jsonl: {} questions\n", output, batch.size());
  return kExitDone;
}

}  // namespace certkv
