#include "runtime/audit/verify.h"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <memory>
#include <mutex>
#include <set>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "runtime/audit/check.h"
#include "runtime/audit/reader.h"

namespace certkv::audit {
namespace {

std::vector<std::string> audit_files(const std::string& folder) {
  CERTKV_EXPECT(std::filesystem::is_directory(folder), InvalidArgument,
                "{}: no such folder; name the folder of an audit (audit.folder of the job)",
                folder);
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().extension() == kExtension) files.push_back(entry.path().string());
  CERTKV_EXPECT(!files.empty(), InvalidArgument,
                "{}: no audit files (*{}) here; jobs write them with --audit.sample", folder,
                kExtension);
  std::sort(files.begin(), files.end());
  return files;
}

class Verifier {
 public:
  explicit Verifier(const VerifyOptions& options) : options_(options), pool_(options.threads) {}
  VerifyResult run();

 private:
  struct Unit {
    const FileIndex* file;
    UnitKey key;
    const std::vector<RecordRef>* records;
  };
  void violation(const std::string& where, const std::string& rule, const std::string& text);
  void read_files();
  void compare_ranks();
  void check_sequences(const FileIndex& file);
  void check_tallies(const FileIndex& file, const StreamInfo& s, const std::string& where);
  void check_choice(const FileIndex& file, const StreamInfo& s);
  void check_unit(const Unit& unit);
  bool load_rows(const FileIndex& file, const PayloadReader& payloads, UnitKey key, HeadRows* x);
  void check_record(const Unit& unit, const StreamInfo& s, const HeadRows& x, const Record& record);

  const VerifyOptions& options_;
  ThreadPool pool_;
  std::vector<FileIndex> files_;
  std::mutex mutex_;
  struct Tally {
    uint64_t records = 0, head_steps = 0;
    std::map<std::string, uint64_t> outcomes, rungs;
  };
  std::map<std::pair<const FileIndex*, uint32_t>, Tally> tallies_;  // by sequence
  VerifyResult result_;
  uint64_t done_ = 0;
};

std::string name_of(const FileIndex& file) {
  return std::filesystem::path(file.path).filename().string();
}

void Verifier::violation(const std::string& where, const std::string& rule,
                         const std::string& text) {
  std::lock_guard lock(mutex_);
  ++result_.violations;
  if (result_.listed.size() < options_.max_listed) result_.listed.push_back({where, rule, text});
}

void Verifier::read_files() {
  const std::vector<std::string> paths = audit_files(options_.folder);
  uint64_t total = 0;
  for (const std::string& p : paths) total += PayloadReader(p).bytes();
  files_.resize(paths.size());
  pool_.parallel_for(paths.size(), [&](size_t i) {
    files_[i] = read_index(paths[i], [&](uint64_t bytes) {
      std::lock_guard lock(mutex_);
      done_ += bytes;
      if (options_.progress) options_.progress("chain", done_, total);
    });
  });
  for (const FileIndex& f : files_) {
    result_.files.push_back({f.path, f.digest, f.bytes, f.links, f.records, f.broken, f.truncated});
    if (!f.broken.empty() && !(f.truncated && options_.allow_truncated))
      violation(name_of(f), f.truncated ? "truncated" : "chain", f.broken);
  }
}

// Every rank's file is there, and they speak of one job.
void Verifier::compare_ranks() {
  std::map<int, std::vector<const FileIndex*>> sessions;
  for (const FileIndex& f : files_) {
    if (!f.has_header) continue;
    const std::string name = file_name(f.header.session, f.header.rank);
    if (name_of(f) != name)
      violation(name_of(f), "files", fmt::format("by its header this is {}", name));
    sessions[f.header.session].push_back(&f);
  }
  for (const auto& [session, files] : sessions) {
    const FileHeader& first = files.front()->header;
    const std::string where = fmt::format("session {}", session);
    std::set<int> ranks;
    std::map<int, int64_t> heads;  // replica -> KV heads seen, from the first on
    using Sequence = std::tuple<int64_t, std::string, uint64_t>;
    std::map<int, std::multiset<Sequence>> sequences;  // of the replica's first rank
    bool whole = true;
    for (const FileIndex* f : files) whole = whole && f->broken.empty();
    for (const FileIndex* f : files) {
      const FileHeader& h = f->header;
      ranks.insert(h.rank);
      if (h.world != first.world || h.tensor != first.tensor || h.sample != first.sample ||
          h.seed != first.seed || h.model_files != first.model_files || h.layers != first.layers ||
          h.kv_heads != first.kv_heads || h.query_heads != first.query_heads)
        violation(name_of(*f), "files", "its header differs from the first rank's");
      if (h.first_kv_head != heads[h.replica])
        violation(name_of(*f), "files",
                  fmt::format("its KV heads begin with {}, {} was next", h.first_kv_head,
                              heads[h.replica]));
      heads[h.replica] = h.first_kv_head + h.local_kv_heads;
      if (!whole) continue;
      std::multiset<Sequence> mine;
      for (const auto& [id, s] : f->streams)
        if (!s.is_prompt()) mine.insert({s.request, s.policy, s.prompt_tokens});
      const auto [at, is_first] = sequences.emplace(h.replica, mine);
      if (!is_first && at->second != mine)
        violation(name_of(*f), "files",
                  "its sequences differ from those of the replica's first rank");
    }
    for (int r = 0; r < first.world; ++r)
      if (ranks.count(r) == 0)
        violation(where, "files",
                  fmt::format("the file of rank {} of {} is missing", r, first.world));
    for (const auto& [replica, next] : heads)
      if (next != first.kv_heads)
        violation(where, "files",
                  fmt::format("replica {} has {} of {} KV heads", replica, next, first.kv_heads));
  }
}

// Exactly the chosen steps are recorded.
void Verifier::check_choice(const FileIndex& f, const StreamInfo& s) {
  const FileHeader& h = f.header;
  uint64_t last = s.tokens;
  if (!s.closed)
    for (const auto& [key, list] : f.record)
      if (key.stream == s.id) last = std::max(last, list.back().tokens);
  // A failed sequence may have lost its last step, one that was left open too.
  if ((s.failed || !s.closed) && last > 0) --last;
  for (uint32_t layer = 0; layer < h.layers; ++layer)
    for (auto head = uint32_t(h.first_kv_head); head < h.first_kv_head + h.local_kv_heads; ++head) {
      const auto at = f.record.find({s.id, layer, head});
      std::set<uint64_t> recorded;
      if (at != f.record.end())
        for (const RecordRef& r : at->second) recorded.insert(r.tokens);
      const auto where = [&](uint64_t tokens) {
        return fmt::format("{} request {} policy {} layer {} KV head {} at {} tokens", name_of(f),
                           s.request, s.policy, layer, head, tokens);
      };
      for (uint64_t t = s.prompt_tokens + 1; t <= last; ++t)
        if (recorded.count(t) == 0 && must_be_recorded(h, s.request, layer, head, t)) {
          violation(where(t), "choice", "the step was chosen and is not recorded");
          break;
        }
      for (uint64_t t : recorded)
        if (!must_be_recorded(h, s.request, layer, head, t) || (s.closed && t > s.tokens)) {
          violation(where(t), "choice", "the step was not chosen and is recorded");
          break;
        }
    }
}

void Verifier::check_sequences(const FileIndex& f) {
  for (const auto& [id, s] : f.streams) {
    if (s.is_prompt()) continue;
    if (f.header.tensor_rank == 0) ++result_.sequences;
    const std::string where =
        fmt::format("{} request {} policy {}", name_of(f), s.request, s.policy);
    if (s.policy != "budget" && s.policy != "paper" && s.policy != "naive" && s.policy != "dense")
      violation(where, "policy", "not a known policy");
    if (!(s.tolerance >= 0)) violation(where, "tolerance", fmt::format("{}", s.tolerance));
    check_choice(f, s);
    if (!s.closed) {
      if (f.broken.empty() && !f.ended) violation(where, "close", "the sequence was never closed");
      continue;
    }
    check_tallies(f, s, where);
  }
}

// What the sequence's end counts is what was found.
void Verifier::check_tallies(const FileIndex& f, const StreamInfo& s, const std::string& where) {
  const Tally& found = tallies_[{&f, s.id}];
  if (found.records != s.records || found.head_steps != s.head_steps)
    violation(where, "counts",
              fmt::format("{} records and {} head-steps, {} and {} were counted", found.records,
                          found.head_steps, s.records, s.head_steps));
  const auto compare = [&](const std::map<std::string, uint64_t>& seen,
                           const std::map<std::string, uint64_t>& counted, const char* what) {
    std::map<std::string, uint64_t> differ = counted;
    for (const auto& [key, n] : seen) differ[key] -= n;  // wraps where there were more
    for (const auto& [key, n] : differ)
      if (n != 0)
        violation(where, "counts",
                  fmt::format("head-steps of {} {} are not as counted", what, key));
  };
  compare(found.outcomes, s.outcomes, "outcome");
  compare(found.rungs, s.rungs, "rung");
}

bool Verifier::load_rows(const FileIndex& f, const PayloadReader& payloads, UnitKey key,
                         HeadRows* x) {
  const auto at = f.rows.find(key);
  if (at == f.rows.end()) return true;
  const size_t d = size_t(f.header.layout.head_dim);
  std::string bytes;
  std::vector<uint16_t> rows;
  for (const RowsRef& r : at->second) {
    if (r.first_row != x->tokens() || !payloads.read(r.place, &bytes)) return false;
    rows.resize(bytes.size() / 2);
    std::copy_n(bytes.data(), bytes.size(), reinterpret_cast<char*>(rows.data()));
    x->append(r.rows, rows.data(), rows.data() + r.rows * d);
  }
  return true;
}

void Verifier::check_record(const Unit& unit, const StreamInfo& s, const HeadRows& x,
                            const Record& record) {
  const FileHeader& h = unit.file->header;
  const RecordHead& r = record.head;
  const auto where = [&](size_t head) {
    return fmt::format("{} request {} policy {} layer {} query head {} at {} tokens (step {})",
                       name_of(*unit.file), s.request, s.policy, r.layer, r.first_query_head + head,
                       r.tokens, r.step);
  };
  const auto per_group = uint64_t(h.query_heads / h.kv_heads),
             block = uint64_t(h.layout.block_tokens);
  if (r.heads != per_group || r.first_query_head != r.kv_head * per_group ||
      r.blocks != (r.tokens + block - 1) / block)
    return violation(
        where(0), "record",
        fmt::format("{} heads from {} and {} blocks", r.heads, r.first_query_head, r.blocks));
  if (r.tokens > x.tokens() || !x.finite())
    return violation(where(0), "originals",
                     x.finite()
                         ? fmt::format("only {} of {} tokens are stored", x.tokens(), r.tokens)
                         : "an original is NaN or infinite");
  for (size_t head = 0; head < record.heads.size(); ++head) {
    const HeadResult result =
        check_head(h, s, x, record, head, [&](const std::string& rule, const std::string& text) {
          violation(where(head), rule, text);
        });
    std::lock_guard lock(mutex_);
    Tally& tally = tallies_[{unit.file, s.id}];
    ++tally.head_steps;
    ++tally.outcomes[result.outcome];
    ++tally.rungs[std::to_string(record.heads[head].head.rung)];
    ++result_.head_steps;
    Tightness& t = result_.tightness[{s.policy, result.outcome}];
    ++t.head_steps;
    if (!result.has_bound) continue;
    const double ratio = result.error == 0 ? 0 : result.error / result.bound;
    t.worst = ratio <= t.worst ? t.worst : ratio;
    t.sum += ratio;
    const double due = result.due == 0 ? 0 : result.due / result.bound;
    t.least_due = std::min(t.least_due, due);
    t.due_sum += due;
    const double relative = result.error == 0 ? 0 : result.error / result.s;
    t.worst_error = relative <= t.worst_error ? t.worst_error : relative;
  }
}

void Verifier::check_unit(const Unit& unit) {
  const FileIndex& f = *unit.file;
  const StreamInfo& s = f.streams.at(unit.key.stream);
  const std::string where = fmt::format("{} request {} policy {} layer {} KV head {}", name_of(f),
                                        s.request, s.policy, unit.key.layer, unit.key.kv_head);
  const PayloadReader payloads(f.path);
  HeadRows x(f.header.layout, f.header.bf16);
  UnitKey prompt = unit.key;
  prompt.stream = s.prompt;
  if (!load_rows(f, payloads, prompt, &x) || x.tokens() != s.prompt_tokens)
    return violation(
        where, "originals",
        fmt::format("{} of {} tokens of the prompt are stored", x.tokens(), s.prompt_tokens));
  if (!load_rows(f, payloads, unit.key, &x))
    return violation(where, "originals", "rows are missing or cannot be read");
  std::string bytes;
  Record record;
  for (const RecordRef& r : *unit.records) {
    const std::string wrong = !payloads.read(r.place, &bytes)
                                  ? "a record cannot be read"
                                  : decode(bytes, size_t(f.header.layout.head_dim), &record);
    if (wrong.empty())
      check_record(unit, s, x, record);
    else
      violation(where, "record", wrong);
    std::lock_guard lock(mutex_);
    ++result_.records;
    ++tallies_[{&f, s.id}].records;
    ++done_;
    uint64_t total = 0;
    for (const FileSummary& file : result_.files) total += file.records;
    if (options_.progress) options_.progress("records", done_, total);
  }
}

VerifyResult Verifier::run() {
  read_files();
  done_ = 0;
  compare_ranks();
  std::vector<Unit> units;
  for (const FileIndex& f : files_) {
    for (const auto& [key, list] : f.record)
      if (f.streams.count(key.stream) != 0) units.push_back({&f, key, &list});
  }
  pool_.parallel_for(units.size(), [&](size_t i) { check_unit(units[i]); });
  for (const FileIndex& f : files_) check_sequences(f);
  return std::move(result_);
}

}  // namespace

VerifyResult verify_folder(const VerifyOptions& options) {
  return Verifier(options).run();
}

}  // namespace certkv::audit
