#include "runtime/open_answers.h"

#include <unistd.h>

#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "runtime/journal.h"
#include "runtime/json_file.h"
#include "runtime/output_file.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// LINE-POLICY of a file's name.
std::optional<std::pair<uint64_t, Policy>> key_of(const std::string& stem) {
  uint64_t line = 0;
  const char* end = stem.data() + stem.size();
  const auto [at, error] = std::from_chars(stem.data(), end, line);
  if (error != std::errc() || at == end || *at != '-') return std::nullopt;
  const auto policy = policy_from_name(std::string(at + 1, end));
  if (!policy) return std::nullopt;
  return std::pair{line, *policy};
}

}  // namespace

std::string encode_progress(const AnswerProgress& p) {
  json v = {{"id", p.id}, {"policy", policy_name(p.policy)}, {"n", p.first}, {"t", p.tokens}};
  if (p.sealed) {
    const SealedAnswer& s = *p.sealed;
    json spans = json::array();
    for (const AnswerSpan& a : s.spans)
      spans.push_back(json::array({a.owner.hi, a.owner.lo, a.first_block, a.blocks}));
    v["sealed"] = {{"tokens", s.tokens},   {"scope", s.scope},     {"spans", spans},
                   {"figures", s.figures}, {"bound", s.bound_sum}, {"relative", s.relative_sum},
                   {"steps", s.steps}};
  }
  return json_line(v);
}

AnswerProgress decode_progress(std::string_view text) {
  const json v = parse_json(text, "an open answer", {.max_bytes = size_t(1) << 30});
  try {
    AnswerProgress p;
    p.id = v.at("id");
    const auto policy = policy_from_name(v.at("policy").get<std::string>());
    CERTKV_EXPECT(policy.has_value(), BadFile, "an open answer: policy {}", v.at("policy").dump());
    p.policy = *policy;
    p.first = v.at("n");
    p.tokens = v.at("t").get<std::vector<int32_t>>();
    if (v.contains("sealed")) {
      const json& s = v.at("sealed");
      SealedAnswer a;
      a.tokens = s.at("tokens");
      a.scope = s.at("scope");
      for (const json& span : s.at("spans"))
        a.spans.push_back({{span.at(0).get<uint64_t>(), span.at(1).get<uint64_t>()},
                           span.at(2).get<uint32_t>(),
                           span.at(3).get<uint32_t>()});
      a.figures = s.at("figures");
      a.bound_sum = s.at("bound");
      a.relative_sum = s.at("relative");
      a.steps = s.at("steps");
      p.sealed = std::move(a);
    }
    return p;
  } catch (const json::exception& e) {
    CERTKV_THROW(BadFile, "an open answer: {}", e.what());
  }
}

bool follow(AnswerState* state, const AnswerProgress& p) {
  if (p.first != state->tokens.size() && !p.tokens.empty()) return false;
  if (p.sealed &&
      (p.sealed->tokens == 0 || p.sealed->tokens > state->tokens.size() + p.tokens.size()))
    return false;
  state->tokens.insert(state->tokens.end(), p.tokens.begin(), p.tokens.end());
  if (p.sealed) state->sealed = p.sealed;
  return true;
}

OpenAnswers::OpenAnswers(std::string folder, std::string job,
                         const std::function<bool(uint64_t, Policy)>& finished)
    : folder_(std::move(folder)), job_(std::move(job)) {
  make_folders(folder_);
  for (const auto& entry : fs::directory_iterator(folder_)) {
    const auto key = key_of(entry.path().stem().string());
    if (!key || entry.path().extension() != ".jsonl") continue;
    if (finished(key->first, key->second))
      ::unlink(entry.path().c_str());
    else
      ++found_;
  }
}

OpenAnswers::~OpenAnswers() = default;

std::string OpenAnswers::path(const Key& key) const {
  return fmt::format("{}/{}-{}.jsonl", folder_, key.first, policy_name(key.second));
}

std::optional<AnswerState> OpenAnswers::load(uint64_t line, Policy policy) {
  const Key key{line, policy};
  AnswerState state;
  state.policy = policy;
  uint64_t sound = 0;
  bool whole = true;
  try {
    const JournalContents contents = read_journal(
        path(key), job_, [&](std::string_view note, std::string_view, JournalPosition where) {
          if (!whole) return;
          const AnswerProgress p = decode_progress(note);
          whole = p.id == line && p.policy == policy && follow(&state, p);
          if (whole) sound = where.offset + where.bytes + 1;
        });
    whole = whole && contents.dropped == 0;
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::IoError) throw;
    log_warning("line {}: {}; what stands before that is used", line, e.what());
  }
  if (!whole)
    log_warning("{}: a damaged or torn line; the answer goes on from what stands before it",
                path(key));
  sound_[key] = sound;
  if (state.tokens.empty()) return std::nullopt;
  return state;
}

void OpenAnswers::add(const AnswerProgress& p) {
  const Key key{p.id, p.policy};
  std::unique_ptr<Journal>& file = files_[key];
  if (file == nullptr) {
    JournalContents contents;
    if (const auto at = sound_.find(key); at != sound_.end() && at->second > 0) {
      contents.exists = true;
      contents.whole_bytes = at->second;
    }
    file = std::make_unique<Journal>(path(key), job_, contents, Journal::Sync::Never);
  }
  file->append(encode_progress(p), "");
}

void OpenAnswers::finish(uint64_t line, Policy policy) {
  const Key key{line, policy};
  files_.erase(key);
  sound_.erase(key);
  ::unlink(path(key).c_str());
}

}  // namespace certkv
