#include "runtime/finished_line.h"

#include <nlohmann/json.hpp>
#include <numeric>

#include "runtime/json_file.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

using nlohmann::json;

// A relative bound is decided as bound <= tolerance * S in one precision and recorded as bound / S
// in another: a few roundings of FP32.
constexpr double kRelativeRounding = 1e-6;

Policy policy_named(const std::string& name) {
  const auto policy = policy_from_name(name);
  CERTKV_EXPECT(policy.has_value(), BadFile, "policy '{}' is not known", name);
  return *policy;
}

}  // namespace

bool over_is_asked_for(Policy policy, bool policy_is_job_wide) {
  return policy_is_job_wide && (policy == Policy::Naive || policy == Policy::Paper);
}

std::string note_of(const FinishedLine& line) {
  Completion c = line.completion;
  c.text.clear();
  c.tokens.clear();
  json steps = json::object();
  for (const auto& [policy, s] : line.time.steps) {
    steps[policy_name(policy)] = json::array({s.seconds, s.tokens});
  }
  return json_line({{"index", line.index},
                    {"line", line.number},
                    {"custom_id", line.custom_id},
                    {"tokens", line.tokens},
                    {"over_asked", line.over_asked},
                    {"completion", completion_json(c)},
                    {"time", json::array({line.time.session, line.time.wall_seconds, steps})}});
}

FinishedLine finished_line_of(std::string_view note) {
  const json v = parse_json(note, "a journal note", {.max_bytes = size_t(1) << 30});
  try {
    FinishedLine line;
    line.index = v.at("index");
    line.number = v.at("line");
    line.custom_id = v.at("custom_id");
    line.tokens = v.at("tokens");
    line.over_asked = v.at("over_asked");
    line.completion = completion_from_json(v.at("completion"));
    line.time.session = v.at("time").at(0);
    line.time.wall_seconds = v.at("time").at(1);
    for (const auto& [name, s] : v.at("time").at(2).items()) {
      line.time.steps[policy_named(name)] = {s.at(0).get<double>(), s.at(1).get<uint64_t>()};
    }
    return line;
  } catch (const json::exception& e) {
    CERTKV_THROW(BadFile, "a journal note: {}", e.what());
  }
}

std::string accounting_error(const Completion& c, const Tolerance& tolerance) {
  const HeadStepCounts& n = c.counts;
  if (n.certified + n.exact + n.over + n.failed != n.head_steps) {
    return fmt::format("{} certified + {} exact + {} over + {} failed are not {} head-steps",
                       n.certified, n.exact, n.over, n.failed, n.head_steps);
  }
  const uint64_t by_rung = std::accumulate(n.rungs.begin(), n.rungs.end(), uint64_t(0));
  if (by_rung != n.head_steps) {
    return fmt::format("the rungs hold {} of {} head-steps", by_rung, n.head_steps);
  }
  if (c.returned.relative.count != 0 && c.returned.relative.count != n.head_steps) {
    return fmt::format("{} returned bounds for {} head-steps", c.returned.relative.count,
                       n.head_steps);
  }
  if (c.failed) return "";
  if (n.failed != 0 || c.outcome == Outcome::Failed) {
    return fmt::format("{} failed head-steps in a request that did not fail", n.failed);
  }
  const bool enforces = c.policy == Policy::Budget || c.policy == Policy::Dense;
  if (n.over != 0 && enforces) {
    return fmt::format("{} head-steps above the tolerance under policy {}, which enforces it",
                       n.over, policy_name(c.policy));
  }
  const Outcome worst = n.over != 0    ? Outcome::Over
                        : n.exact != 0 ? Outcome::Exact
                                       : Outcome::Certified;
  if (n.head_steps != 0 && c.outcome != worst) {
    return fmt::format("outcome {} for a request whose worst head-step is {}",
                       outcome_name(c.outcome), outcome_name(worst));
  }
  if (worst == Outcome::Certified && n.head_steps != 0) {
    const double bound = tolerance.is_relative ? c.relative_max : c.bound_max;
    if (!(bound <= tolerance.value * (1 + kRelativeRounding))) {
      return fmt::format("certified at a bound of {} with a tolerance of {}", upper_text(bound),
                         tolerance.value);
    }
  }
  return "";
}

}  // namespace certkv
