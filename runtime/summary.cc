#include "runtime/summary.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "runtime/output_file.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

using nlohmann::json;

void merge(Completion::Distribution& into, const Completion::Distribution& from) {
  into.bound.merge(from.bound);
  into.relative.merge(from.relative);
}

json distribution_json(const Completion::Distribution& d) {
  json v = json::object();
  put_figure(v, "bound_max", d.bound.max);
  put_figure(v, "bound_mean", d.bound.mean());
  put_figure(v, "bound_p99", d.bound.quantile(0.99));
  put_figure(v, "relative_max", d.relative.max);
  put_figure(v, "relative_mean", d.relative.mean());
  put_figure(v, "relative_p50", d.relative.quantile(0.50));
  put_figure(v, "relative_p95", d.relative.quantile(0.95));
  put_figure(v, "relative_p99", d.relative.quantile(0.99));
  return v;
}

double ratio(double a, double b) {
  return b > 0 ? a / b : 0;
}

void put_policy(json& v, const PolicySummary& s) {
  v["requests"] = s.requests;
  v["requests_failed"] = s.requests_failed;
  v["requests_certified"] = s.requests_certified;
  v["requests_exact"] = s.requests_exact;
  v["requests_over"] = s.requests_over;
  v["requests_over_unasked"] = s.requests_over_unasked;
  v["tokens"] = s.tokens;
  v["prompt_tokens"] = s.prompt_tokens;
  v["reused_prompt_tokens"] = s.reused_prompt_tokens;
  put_counts(v, s.counts);
  v["returned"] = distribution_json(s.returned);
  v["candidate"] = distribution_json(s.candidate);
  v["tier1_bytes"] = s.tier1_bytes;
  v["dense_bytes"] = s.dense_bytes;
  v["decode_tokens"] = s.step_tokens;
  put_figure(v, "decode_seconds", s.step_seconds);
  put_figure(v, "prefill_seconds", s.prefill_seconds);
  put_figure(v, "tokens_per_second", ratio(double(s.step_tokens), s.step_seconds));
}

void check(const PolicySummary& s) {
  const HeadStepCounts& c = s.counts;
  CERTKV_EXPECT(c.certified + c.exact + c.over + c.failed == c.head_steps &&
                    std::accumulate(c.rungs.begin(), c.rungs.end(), uint64_t(0)) == c.head_steps,
                Uncertifiable,
                "policy {}: {} head-steps are {} certified + {} exact + {} over + {} failed, and "
                "the rungs hold {}: the counts do not add up",
                policy_name(s.policy), c.head_steps, c.certified, c.exact, c.over, c.failed,
                std::accumulate(c.rungs.begin(), c.rungs.end(), uint64_t(0)));
  CERTKV_EXPECT(
      s.requests_failed + s.requests_certified + s.requests_exact + s.requests_over == s.requests,
      Uncertifiable, "policy {}: the outcomes of {} requests do not add up", policy_name(s.policy),
      s.requests);
}

}  // namespace

void PolicySummary::add(const FinishedLine& line) {
  const Completion& c = line.completion;
  ++requests;
  if (c.failed) {
    ++requests_failed;
  } else if (c.outcome == Outcome::Over) {
    ++requests_over;
    if (!line.over_asked) ++requests_over_unasked;
  } else if (c.outcome == Outcome::Exact) {
    ++requests_exact;
  } else {
    ++requests_certified;
  }
  tokens += line.tokens;
  prompt_tokens += c.prompt_tokens;
  reused_prompt_tokens += c.reused_tokens;
  counts.add(c.counts);
  merge(returned, c.returned);
  merge(candidate, c.candidate);
  tier1_bytes += c.tier1_bytes;
  dense_bytes += c.dense_bytes;
  prefill_seconds += c.prefill_seconds;
}

Summary::Summary(std::vector<Policy> policies, Tolerance tolerance, bool compare)
    : policies_(std::move(policies)), tolerance_(tolerance), compare_(compare) {
  for (Policy p : policies_) by_policy_[p].policy = p;
}

void Summary::add(const FinishedLine& line) {
  PolicySummary& s = by_policy_[line.completion.policy];
  s.policy = line.completion.policy;
  s.add(line);
  all_.add(line);
  SessionTime& last = sessions_[line.time.session];
  if (line.time.wall_seconds >= last.wall_seconds) last = line.time;
}

PolicySummary Summary::total() const {
  PolicySummary all = all_;
  all.policy = policies_.front();
  for (const auto& [name, time] : sessions_) {
    for (const auto& [policy, steps] : time.steps) {
      all.step_seconds += steps.seconds;
      all.step_tokens += steps.tokens;
    }
  }
  return all;
}

double Summary::wall_seconds() const {
  double sum = 0;
  for (const auto& [name, time] : sessions_) sum += time.wall_seconds;
  return sum;
}

uint64_t Summary::sessions() const {
  return sessions_.size();
}

int Summary::exit_code() const {
  if (!complete) return kJobStopped;
  return all_.requests_failed != 0 || all_.requests_over_unasked != 0 ? kJobHasFailedLines
                                                                      : kJobSucceeded;
}

json Summary::json() const {
  std::map<Policy, PolicySummary> with_time = by_policy_;
  for (const auto& [name, time] : sessions_) {
    for (const auto& [policy, steps] : time.steps) {
      with_time[policy].policy = policy;
      with_time[policy].step_seconds += steps.seconds;
      with_time[policy].step_tokens += steps.tokens;
    }
  }
  nlohmann::json policies = nlohmann::json::object();
  for (const auto& [policy, s] : with_time) {
    check(s);
    nlohmann::json one = {{"policy", policy_name(policy)},
                          {"tolerance", tolerance_json(tolerance_)}};
    put_policy(one, s);
    policies[policy_name(policy)] = one;
  }
  // Without `compare` the top counts every line, whatever policy it asked for itself.
  nlohmann::json v;
  if (compare_) {
    v = policies[policy_name(policies_.front())];
  } else {
    check(total());
    put_policy(v, total());
    v["policy"] = policy_name(policies_.front());
    v["tolerance"] = tolerance_json(tolerance_);
  }
  v["policies"] = policies;
  v["compare"] = nlohmann::json::array();
  if (compare_) {
    for (Policy p : policies_) v["compare"].push_back(policy_name(p));
  }
  v["lines"] = lines_total;
  v["complete"] = complete;
  v["exit_code"] = exit_code();
  v["tier1_digest"] = tier1_digest;
  if (audit_sample > 0) v["audit"] = {{"sample", audit_sample}, {"folder", audit_folder}};
  v["sessions"] = sessions();
  put_figure(v, "wall_seconds", wall_seconds());
  v["format"] = 1;
  return v;
}

std::string Summary::csv() const {
  const nlohmann::json summary = json();
  static constexpr const char* kColumns[] = {"policy",
                                             "requests",
                                             "requests_failed",
                                             "requests_over",
                                             "tokens",
                                             "prompt_tokens",
                                             "reused_prompt_tokens",
                                             "head_steps",
                                             "certified",
                                             "exact",
                                             "failed",
                                             "over",
                                             "promoted_keys",
                                             "promoted_values",
                                             "scratch_hit_rate",
                                             "paged_bytes",
                                             "tier1_bytes",
                                             "dense_bytes",
                                             "decode_seconds",
                                             "prefill_seconds",
                                             "tokens_per_second"};
  static constexpr const char* kBounds[] = {"bound_max", "relative_max", "relative_p99"};
  const auto cell = [](const nlohmann::json& v) {
    return v.is_null() ? std::string() : v.is_string() ? v.get<std::string>() : v.dump();
  };
  std::string text;
  for (const char* c : kColumns) text += std::string(c) + ",";
  text += "tolerance_kind,tolerance";
  for (int r = 0; r < kRungs; ++r) text += fmt::format(",rung_{}", r);
  for (const char* side : {"returned", "candidate"}) {
    for (const char* b : kBounds) text += fmt::format(",{}_{}", side, b);
  }
  text += "\n";
  for (const auto& [name, p] : summary["policies"].items()) {
    for (const char* c : kColumns) text += cell(p[c]) + ",";
    text += tolerance_.is_relative ? "relative," : "absolute,";
    text += cell(p["tolerance"][tolerance_.is_relative ? "relative" : "absolute"]);
    for (int r = 0; r < kRungs; ++r) text += "," + cell(p["rungs"][std::to_string(r)]);
    for (const char* side : {"returned", "candidate"}) {
      // An empty cell: not finite, summary.json says which.
      for (const char* b : kBounds) text += "," + cell(p[side][b]);
    }
    text += "\n";
  }
  return text;
}

void Summary::write(const std::string& folder) const {
  write_file_atomically(folder + "/summary.json", json().dump(2) + "\n");
  write_file_atomically(folder + "/summary.csv", csv());
}

}  // namespace certkv
