// Questions with known answers over long texts, for the demo models.
//
// reader: facts of four kinds stand somewhere in English text, as in the model's training; after
// "Questions about the text above." one of them is asked for. needle: project codenames stand in
// the text; the prompt ends with the words before one of them, which the model then copies. Both
// answers end at the full stop.
//
// The same text, options and seed give the same batch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace certkv {

struct DemoBatchOptions {
  std::string model = "reader";   // reader, needle
  std::vector<int64_t> contexts;  // tokens of prompt + answer, one document for each
  int64_t questions = 1;          // per document, one prompt for each
  uint64_t seed = 1;
};

struct DemoQuestion {
  std::string custom_id;
  std::string prompt;
  std::string expected;  // without the blank before it and the full stop after it
  std::vector<std::string> stop;
  int64_t max_tokens = 0;
  int64_t context_tokens = 0;
};

// Default contexts of a model. InvalidArgument for an unknown one.
DemoBatchOptions demo_defaults(const std::string& model);

// text: English prose; bytes that are not ASCII are left out. One byte is one token for both
// models. ERRORS: InvalidArgument for an unknown model, contexts too short for their facts, or a
// text that is shorter than the longest context.
std::vector<DemoQuestion> make_demo_batch(const std::string& text, const DemoBatchOptions& options);

// The regular files of a folder put together in the order of their names, links left out, or one
// file. Debian has its licences in kDemoTextFolder. ERRORS: BadFile.
inline constexpr const char* kDemoTextFolder = "/usr/share/common-licenses";
std::string read_demo_text(const std::string& path);

// Writes folder/batch.jsonl (OpenAI batch) and folder/answers.jsonl ({"custom_id", "expected"}).
void write_demo_batch(const std::string& folder, const std::vector<DemoQuestion>& questions,
                      const std::string& model);

// What a file of results got right.
struct DemoScore {
  uint64_t right = 0, questions = 0;
  std::vector<std::string> wrong;  // custom_ids, those without an answer included
};
DemoScore score_results(const std::string& results_path, const std::string& answers_path);

// True iff the answer, up to its first full stop or line feed and without blanks around it, is the
// expected one.
bool answer_is_right(const std::string& text, const std::string& expected);

// The table of a run over a demo batch: for each policy answers right, tokens per second, KV bytes
// against dense, worst returned bound and head-steps per rung. run_folder: of certkv run.
std::string demo_table(const std::string& run_folder, const std::string& answers_path);

}  // namespace certkv
