#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <thread>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kvstore/client.h"
#include "parallel/communicator.h"
#include "runtime/audit/verify.h"
#include "runtime/demo_batch.h"
#include "runtime/tokenizer.h"
#include "tests/faults/worker.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/thread_ranks.h"

namespace certkv::faults {
namespace {

constexpr int64_t kContext = 512;
constexpr size_t kQuestions = 4;  // one for each text

// Every name that a fault can be told by is a name of ErrorKind.
Outcome named(const std::string& kind, const std::string& text) {
  if (kind.empty() || kind == "unknown" || text.empty())
    return {Outcome::Result::Violation, "an error without a name: '" + text + "'"};
  return {Outcome::Result::Named, kind + ": " + text.substr(0, 160)};
}

audit::VerifyResult verified_folder(const std::string& folder) {
  audit::VerifyOptions o;
  o.folder = folder;
  return audit::verify_folder(o);
}

}  // namespace

const char* result_name(Outcome::Result result) {
  switch (result) {
    case Outcome::Result::Same:
      return "same answer";
    case Outcome::Result::Named:
      return "named error";
    case Outcome::Result::Violation:
      return "violation";
    case Outcome::Result::Unreached:
      return "not reached";
    case Outcome::Result::InDoubt:
      return "in doubt";
  }
  return "violation";
}

Bench::Bench(const std::string& model, const std::string& folder)
    : model_(model),
      folder_(folder),
      config_(std::make_shared<const ModelConfig>(load_model_config(model))),
      tokenizer_(load_tokenizer(model)) {
  for (const int ranks : {1, 2})
    for (int rank = 0; rank < ranks; ++rank)
      weights_[ranks].push_back(
          std::make_shared<const Weights>(load_weights(model, *config_, ranks, rank)));
  DemoBatchOptions demo = demo_defaults("reader");
  demo.contexts.assign(kQuestions, kContext);
  demo.questions = 1;
  for (const DemoQuestion& q : make_demo_batch(read_demo_text(kDemoTextFolder), demo)) {
    Request r;
    r.id = questions_.size();
    r.prompt = tokenizer_->encode(q.prompt, true);
    r.sampling.max_tokens = q.max_tokens;
    r.sampling.stop = q.stop;
    questions_.push_back(r);
  }
  for (const int ranks : {1, 2})
    for (size_t i = 0; i < questions_.size(); ++i) {
      Job job;
      job.ranks = ranks;
      const Answer a = answer(job, i);
      CERTKV_EXPECT(a.done && !a.failed, Uncertifiable, "without a fault: {}", a.error);
      right_[ranks].push_back(a.text);
      const auto verified = verified_folder(folder_);
      CERTKV_EXPECT(verified.violations == 0 && verified.head_steps > 0, Uncertifiable,
                    "without a fault: {} violations", verified.violations);
    }
}

// Throws what ends the ranks.
Bench::Answer Bench::answer(const Job& job, size_t question) {
  std::filesystem::remove_all(folder_);
  std::filesystem::create_directories(folder_);
  JobOptions options;
  options.run.tier1_memory = "1GiB";
  options.tolerance = {true, 0.05};
  options.cache.scrub_steps = job.scrub_steps;
  options.store.deadline_seconds = std::chrono::duration<double>(job.silence).count();
  test::ThreadHolder store(job.arena_bytes);
  Answer answer;
  std::atomic<bool> done = false;
  std::thread beside;
  if (job.beside) beside = std::thread([&] { job.beside(store.socket(), done); });
  struct Join {
    std::atomic<bool>& done;
    std::thread& thread;
    ~Join() {
      done = true;
      if (thread.joinable()) thread.join();
    }
  } const join{done, beside};
  failpoint::clear();
  failpoint::set(job.failpoints);
  if (const char* also = std::getenv("CERTKV_FAULTS_ALSO")) failpoint::set(also);
  run_thread_ranks(job.ranks, [&](LocalWorld& world, int rank) {
    const auto group = world.communicator(rank);
    group->set_silence(job.silence);
    EngineParts parts;
    parts.config = config_;
    parts.weights = weights_.at(job.ranks)[size_t(rank)];
    parts.tokenizer = tokenizer_;
    parts.group = group.get();
    StoreClientOptions client;
    client.socket = store.socket();
    client.rank = rank;
    client.deadline = job.silence;
    client.heartbeat = std::min(client.heartbeat, job.silence / 4);
    parts.store = StoreClient::attach(client, Deadline::after(job.silence));
    parts.audit = AuditSetup{.folder = folder_,
                             .sample = 1.0,
                             .rank = rank,
                             .world = job.ranks,
                             .tensor_rank = rank,
                             .tensor = job.ranks,
                             .model_files = "faults"};
    const auto engine = make_engine(options, parts);
    uint64_t steps = 0;
    engine->on_completion = [&](Completion&& c) {
      answer.done = true;
      answer.failed = c.failed;
      answer.text = c.text;
      answer.error_kind = c.error_kind;
      answer.error = c.error;
      answer.digest = c.counts.digest + c.counts.canary;
    };
    engine->on_step = [&](const StepRecord&) {
      if (job.between) job.between(*parts.store, steps);
      if (steps++ == job.store_ends_after) store.stop();
    };
    if (rank == 0) {
      Request r = questions_[question];
      r.tolerance = options.tolerance;
      engine->submit(std::move(r));
    }
    while (engine->step(false)) {
    }
  });
  return answer;
}

Outcome Bench::run(const Job& job, Draw& draw) {
  const size_t question = size_t(draw.below(questions_.size()));
  Answer a;
  std::optional<Error> ended;
  try {
    a = answer(job, question);
  } catch (const Error& e) {
    ended = e;
  }
  bool met = job.failpoints.empty();
  for (const failpoint::Row& row : failpoint::table()) met = met || failpoint::fired(row.name) > 0;
  failpoint::clear();
  if (ended) return named(error_kind_name(ended->kind()), ended->what());
  if (!a.done)
    return {Outcome::Result::Violation, "it ended without an answer and without an error"};
  if (a.failed) return named(a.error_kind, a.error);

  const std::string& right = right_.at(job.ranks)[question];
  const auto verified = verified_folder(folder_);
  std::string wrong;
  if (a.text != right) wrong = "'" + a.text + "' instead of '" + right + "'";
  if (verified.violations > 0) {
    wrong += fmt::format("; {} violations of certificates", verified.violations);
    if (!verified.listed.empty())
      wrong += ", first " + verified.listed[0].rule + ": " + verified.listed[0].text;
  }
  if (!wrong.empty()) {
    // Noticed, and said so in the result, after it had been used: see tests/README.md.
    const bool said = job.may_be_in_doubt && a.digest > 0;
    return {said ? Outcome::Result::InDoubt : Outcome::Result::Violation, wrong};
  }
  if (!met) return {Outcome::Result::Unreached, job.failpoints};
  return {Outcome::Result::Same, a.digest > 0 ? "noticed" : ""};
}

}  // namespace certkv::faults
