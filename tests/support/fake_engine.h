// An engine without a model: answers each request with a text made from its prompt, one token per
// step, with head-steps whose outcomes and bounds are known beforehand.
#pragma once

#include <deque>
#include <functional>
#include <iterator>
#include <list>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "runtime/engine.h"

namespace certkv::test {

class FakeEngine : public Engine {
 public:
  static constexpr uint64_t kHeads = 4;  // head-steps per decode step
  static constexpr double kNaiveRelative = 0.5;

  int64_t token_limit = 1000;
  uint64_t max_running = 2;
  std::function<void(uint64_t step)> before_step;  // may throw, sleep, raise a signal
  uint64_t fail_request = ~uint64_t(0);            // this one fails in its second step
  bool ends_without_steps = false;                 // an answer of one token ends with the prefill
  uint64_t submitted = 0;

  static std::string answer(const std::vector<int32_t>& prompt, int64_t max_tokens) {
    std::string text;
    for (size_t i = 0; i < prompt.size() && int64_t(i) < max_tokens; ++i) {
      text += char('a' + (prompt[i] + int32_t(i)) % 26);
    }
    return text;
  }

  void submit(Request r) override {
    CERTKV_EXPECT(int64_t(r.prompt.size()) + r.sampling.max_tokens <= token_limit, InvalidArgument,
                  "prompt of {} tokens is longer than the limit of {}", r.prompt.size(),
                  token_limit);
    ++submitted;
    waiting_.push_back(std::move(r));
  }

  bool step(bool stop) override {
    if (stop) return false;
    if (waiting_.empty() && running_.empty()) return false;
    ++step_;
    if (before_step) before_step(step_);
    if (!waiting_.empty() && running_.size() < max_running) {
      admit(waiting_.front());
      waiting_.pop_front();
      return true;
    }
    decode();
    return true;
  }

  Load load() const override {
    Load l;
    l.waiting = waiting_.size();
    l.running = running_.size();
    return l;
  }

 private:
  struct Running {
    Request request;
    Completion c;
    std::string whole;
    size_t done = 1;  // the first token is the prefill's
  };

  void admit(const Request& r) {
    std::vector<Policy> policies = r.compare;
    if (policies.empty()) policies = {r.policy};
    for (Policy p : policies) {
      Running g;
      g.request = r;
      g.c.id = r.id;
      g.c.policy = p;
      g.c.prompt_tokens = r.prompt.size();
      g.c.tier1_bytes = 240 * r.prompt.size();
      g.c.dense_bytes = 512 * r.prompt.size();
      g.whole = answer(r.prompt, r.sampling.max_tokens);
      running_.push_back(std::move(g));
      if (ends_without_steps && running_.back().whole.size() == 1) {
        finish(std::prev(running_.end()), false);
      }
    }
  }

  void decode() {
    auto g = running_.begin();
    StepRecord record;
    record.step = step_;
    record.policy = g->c.policy;
    record.sequences = record.tokens = 1;
    record.seconds = 0.001;
    HeadStepCounts n;
    n.head_steps = kHeads;
    double relative = g->request.tolerance.value / 2;
    if (g->c.policy == Policy::Dense) {
      n.exact = n.rungs[3] = kHeads;
    } else if (g->c.policy == Policy::Budget) {
      n.certified = n.rungs[0] = kHeads;
    } else {
      n.certified = kHeads - 1;
      n.over = 1;
      n.rungs[0] = kHeads;
      relative = kNaiveRelative;
    }
    const bool fails = g->request.id == fail_request && g->done == 2;
    if (fails) {
      n = HeadStepCounts{};
      n.head_steps = n.failed = n.rungs[4] = kHeads;
    }
    g->c.counts.add(n);
    record.counts = n;
    record.returned.relative_max = relative;
    for (uint64_t h = 0; h < n.head_steps; ++h) {
      g->c.returned.relative.add(relative);
      g->c.returned.bound.add(2 * relative);
      g->c.candidate.relative.add(3 * relative);
      g->c.candidate.bound.add(4 * relative);
    }
    g->c.relative_max = g->c.returned.relative.max;
    g->c.bound_max = g->c.returned.bound.max;
    if (on_step) on_step(record);
    ++g->done;
    if (fails || g->done > g->whole.size()) return finish(g, fails);
    running_.splice(running_.end(), running_, g);  // the others take turns
  }

  void finish(std::list<Running>::iterator g, bool failed) {
    Completion c = std::move(g->c);
    if (failed) {
      c.failed = true;
      c.error_kind = "OriginalsLost";
      c.error = "a block is lost";
      c.outcome = Outcome::Failed;
    } else {
      c.text = g->whole;
      c.tokens.assign(g->whole.begin(), g->whole.end());
      c.finish_reason = "stop";
      c.outcome = c.counts.over != 0    ? Outcome::Over
                  : c.counts.exact != 0 ? Outcome::Exact
                                        : Outcome::Certified;
    }
    running_.erase(g);
    if (on_completion) on_completion(std::move(c));
  }

  std::deque<Request> waiting_;
  std::list<Running> running_;
  uint64_t step_ = 0;
};

}  // namespace certkv::test
