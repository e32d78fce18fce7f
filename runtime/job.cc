#include "runtime/job.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <thread>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "parallel/message_channel.h"
#include "runtime/record_json.h"
#include "runtime/request_wire.h"
#include "runtime/step_log.h"

namespace certkv {
namespace {

// First byte of a message between leaders.
enum class Word : char {
  Request = 'R',     // to a replica: a request
  NoMore = 'N',      // to a replica: finish what you have, then end
  Stop = 'S',        // to a replica: end now
  Completion = 'C',  // to rank 0
  Step = 'T',        // to rank 0: a line of steps.jsonl
  Progress = 'P',    // to rank 0: news of an answer
};

constexpr std::chrono::milliseconds kIdle{2};
constexpr std::chrono::milliseconds kFlushSilence{2000};

std::string message(Word word, std::string_view body) {
  std::string bytes(1, char(word));
  bytes.append(body);
  return bytes;
}

std::string message(Word word, std::span<const std::byte> body) {
  return message(word, std::string_view(reinterpret_cast<const char*>(body.data()), body.size()));
}

bool has_work(const Engine& engine) {
  const Engine::Load load = engine.load();
  return load.waiting + load.running != 0;
}

void idle(const JobRank& rank) {
  if (rank.alive) rank.alive();
  std::this_thread::sleep_for(kIdle);
}

std::vector<Policy> policies_of(const Request& r) {
  return r.compare.empty() ? std::vector<Policy>{r.policy} : r.compare;
}

// Submits; a request that can never be admitted comes back as failed completions.
void submit(Engine& engine, Request request, const std::function<void(Completion&&)>& failed) {
  const uint64_t id = request.id;
  const uint64_t prompt_tokens = request.prompt.size();
  const std::vector<Policy> policies = policies_of(request);
  std::optional<Error> refused;
  try {
    engine.submit(std::move(request));
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::InvalidArgument && e.kind() != ErrorKind::OutOfMemory) throw;
    refused = e;
  }
  if (!refused) return;
  for (Policy policy : policies) {
    Completion c = failed_completion(id, policy, refused->kind(), refused->what());
    c.prompt_tokens = prompt_tokens;
    failed(std::move(c));
  }
}

// Rank 0's view of the whole job.
class Dealer {
 public:
  Dealer(const JobRank& rank, JobInput input, JobOutput& output)
      : rank_(rank), input_(std::move(input)), output_(output), stock_(size_t(rank.replicas), 0) {}

  int run();

 private:
  struct Open {
    LineIdentity line;
    std::set<Policy> policies;
    bool policy_is_job_wide = true;
    int replica = 0;
  };

  uint64_t stock_limit() const { return 2 * uint64_t(rank_.max_batch); }
  void deal();
  std::optional<Request> next_request(Open& open);
  void fail_line(const BatchLine& line, const std::vector<Policy>& policies, ErrorKind kind,
                 const std::string& message);
  void completed(Completion&& completion);
  void receive();
  void stop_all();

  const JobRank& rank_;
  JobInput input_;
  JobOutput& output_;
  bool input_ended_ = false;
  std::map<uint64_t, Open> open_;  // by line
  std::vector<uint64_t> stock_;    // requests dealt and not finished, by replica
};

void Dealer::fail_line(const BatchLine& line, const std::vector<Policy>& policies, ErrorKind kind,
                       const std::string& text) {
  for (Policy p : policies) {
    output_.finish(identity_of(line), failed_completion(line.index, p, kind, text),
                   !line.policy_asked, 0);
  }
}

// Lines that are bad, or cannot be made into tokens, are finished on the way.
std::optional<Request> Dealer::next_request(Open& open) {
  while (auto line = input_.reader.next()) {
    std::vector<Policy> missing = output_.missing(line->index);
    if (missing.empty()) continue;
    if (input_.compare.empty()) missing = {line->policy};
    if (line->bad) {
      fail_line(*line, missing, line->error_kind, line->error);
      continue;
    }
    Request request;
    try {
      request.prompt = input_.encode(*line);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::InvalidArgument && e.kind() != ErrorKind::BadFile) throw;
      fail_line(*line, missing, e.kind(), fmt::format("line {}: {}", line->number, e.what()));
      continue;
    }
    request.id = line->index;
    request.sampling = line->sampling;
    request.tolerance = line->tolerance;
    request.policy = missing.front();
    if (!input_.compare.empty()) request.compare = missing;
    request.policy_is_job_wide = !line->policy_asked;
    request.resumed = output_.open_answers(line->index, missing);
    open = {identity_of(*line), {missing.begin(), missing.end()}, !line->policy_asked, 0};
    return request;
  }
  input_ended_ = true;
  return std::nullopt;
}

void Dealer::deal() {
  while (!input_ended_) {
    size_t least = 0;
    for (size_t r = 1; r < stock_.size(); ++r) {
      if (stock_[r] < stock_[least]) least = r;
    }
    if (stock_[least] >= stock_limit()) return;
    Open open;
    std::optional<Request> request = next_request(open);
    if (!request) {
      for (int r = 1; r < rank_.replicas; ++r) rank_.channel->send(r, message(Word::NoMore, ""));
      return;
    }
    const uint64_t id = request->id;
    open.replica = int(least);
    open_[id] = std::move(open);
    ++stock_[least];
    if (least == 0) {
      submit(rank_.engine, std::move(*request), [&](Completion&& c) { completed(std::move(c)); });
    } else {
      rank_.channel->send(int(least), message(Word::Request, encode_request(*request)));
    }
  }
}

void Dealer::completed(Completion&& c) {
  const auto at = open_.find(c.id);
  CERTKV_EXPECT(at != open_.end() && at->second.policies.erase(c.policy) == 1, CommError,
                "an answer came for line {} under policy {}, which is not open", c.id,
                policy_name(c.policy));
  const Open open = at->second;
  if (open.policies.empty()) {
    open_.erase(at);
    --stock_[size_t(open.replica)];
  }
  output_.finish(open.line, std::move(c), open.policy_is_job_wide, open.replica);
}

void Dealer::receive() {
  if (rank_.channel == nullptr) return;
  while (auto m = rank_.channel->try_receive()) {
    CERTKV_EXPECT(!m->bytes.empty(), CommError, "replica {}: an empty message", m->from);
    const std::string_view body = std::string_view(m->bytes).substr(1);
    switch (Word(m->bytes[0])) {
      case Word::Completion:
        completed(decode_completion(body));
        break;
      case Word::Step:
        output_.step(std::string(body));
        break;
      case Word::Progress:
        output_.progress(decode_progress(body));
        break;
      default:
        CERTKV_THROW(CommError, "replica {}: a message of kind {}", m->from, int(m->bytes[0]));
    }
  }
}

void Dealer::stop_all() {
  for (int r = 1; r < rank_.replicas; ++r) rank_.channel->send(r, message(Word::Stop, ""));
  if (rank_.channel != nullptr) rank_.channel->flush(kFlushSilence);
}

int Dealer::run() {
  rank_.engine.on_completion = [this](Completion&& c) { completed(std::move(c)); };
  rank_.engine.on_step = [this](const StepRecord& r) { output_.step(r, 0); };
  rank_.engine.on_progress = [this](const AnswerProgress& p) { output_.progress(p); };
  rank_.engine.on_prefill_progress = [this](double share) { output_.prefilling(share); };
  bool stopped = false;
  for (;;) {
    stopped = rank_.stop && rank_.stop();
    if (stopped) break;
    receive();
    deal();
    if (has_work(rank_.engine)) {
      rank_.engine.step(false);
    } else if (input_ended_ && open_.empty()) {
      break;
    } else {
      idle(rank_);
    }
    Engine::Load load = rank_.engine.load();
    load.running =
        open_.size() - std::min<uint64_t>(open_.size(), load.waiting);  // not their forks
    output_.tick(load);
  }
  if (stopped) {
    // What counts comes first: mpirun may leave no time for a farewell.
    const int code = output_.close();
    stop_all();
    rank_.engine.step(true);
    return code;
  }
  rank_.engine.step(false);  // without work: tells the group that this is the end
  if (rank_.channel != nullptr) rank_.channel->flush(kFlushSilence);
  return output_.close();
}

}  // namespace

int run_job(const JobRank& rank, JobInput input, JobOutput& output) {
  CERTKV_EXPECT(rank.replicas == 1 || rank.channel != nullptr, InvalidArgument,
                "{} replicas need a channel between their leaders", rank.replicas);
  try {
    return Dealer(rank, std::move(input), output).run();
  } catch (...) {
    if (rank.on_error) rank.on_error();
    try {
      output.close();
    } catch (const Error& e) {
      log_error("{}", e.what());
    }
    throw;
  }
}

void run_replica(const JobRank& rank) {
  MessageChannel& channel = *rank.channel;
  const auto answer = [&](Completion&& c) {
    channel.send(0, message(Word::Completion, encode_completion(c)));
  };
  rank.engine.on_completion = answer;
  rank.engine.on_progress = [&](const AnswerProgress& p) {
    channel.send(0, message(Word::Progress, encode_progress(p)));
  };
  rank.engine.on_step = [&](const StepRecord& r) {
    channel.send(0, message(Word::Step, json_line(step_json(r, rank.replica, ""))));
  };
  bool no_more = false, stopped = false;
  while (!stopped) {
    while (auto m = channel.try_receive()) {
      CERTKV_EXPECT(m->from == 0 && !m->bytes.empty(), CommError, "replica {}: a message from {}",
                    rank.replica, m->from);
      const std::string_view body = std::string_view(m->bytes).substr(1);
      switch (Word(m->bytes[0])) {
        case Word::Request:
          submit(rank.engine, decode_request(std::as_bytes(std::span(body.data(), body.size()))),
                 answer);
          break;
        case Word::NoMore:
          no_more = true;
          break;
        case Word::Stop:
          stopped = true;
          break;
        default:
          CERTKV_THROW(CommError, "replica {}: a message of kind {}", rank.replica,
                       int(m->bytes[0]));
      }
    }
    stopped = stopped || (rank.stop && rank.stop());
    if (stopped) break;
    if (has_work(rank.engine)) {
      rank.engine.step(false);
    } else if (no_more) {
      break;
    } else {
      idle(rank);
    }
  }
  rank.engine.step(stopped);
  channel.flush(kFlushSilence);
}

void run_follower(Engine& engine) {
  while (engine.step(false)) {
  }
}

}  // namespace certkv
