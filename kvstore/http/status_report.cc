#include "kvstore/http/status_report.h"

#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <cmath>
#include <nlohmann/json.hpp>

namespace certkv {
namespace {

using nlohmann::json;

json figure(double x) {
  if (std::isnan(x)) return "nan";
  if (std::isinf(x)) return x > 0 ? "inf" : "-inf";
  return x;
}

class Families {
 public:
  using Labels = std::vector<prometheus::ClientMetric::Label>;
  void gauge(const std::string& stem, const std::string& help, double value, Labels labels = {}) {
    metric(stem, help, prometheus::MetricType::Gauge, std::move(labels)).gauge.value = value;
  }
  void counter(const std::string& stem, const std::string& help, uint64_t value,
               Labels labels = {}) {
    metric(stem + "_total", help, prometheus::MetricType::Counter, std::move(labels))
        .counter.value = double(value);
  }
  std::string text() const { return prometheus::TextSerializer().Serialize(all_); }

 private:
  prometheus::ClientMetric& metric(const std::string& stem, const std::string& help,
                                   prometheus::MetricType type, Labels labels) {
    const std::string name = "certkv:" + stem;
    if (all_.empty() || all_.back().name != name) all_.push_back({name, help, type, {}});
    all_.back().metric.emplace_back().label = std::move(labels);
    return all_.back().metric.back();
  }
  std::vector<prometheus::MetricFamily> all_;
};

void add_job(const StatusReport::Job& j, Families& f) {
  f.gauge("num_requests_running", "Requests that are being decoded", double(j.running));
  f.gauge("num_requests_waiting", "Requests that wait to be admitted", double(j.waiting));
  f.counter("request_success", "Requests that were answered",
            j.finished - std::min(j.finished, j.failed));
  f.counter("request_failure", "Requests that ended with an error", j.failed);
  f.counter("generation_tokens", "Tokens generated", j.generation_tokens);
  f.counter("prompt_tokens", "Tokens of prompts of answered requests", j.prompt_tokens);
  f.counter("iterations", "Decode steps", j.steps);
  f.gauge("generation_tokens_per_second", "Tokens generated per second of late",
          j.tokens_per_second);
  const std::pair<const char*, uint64_t> outcomes[] = {{"certified", j.certified},
                                                       {"exact", j.exact},
                                                       {"over", j.over},
                                                       {"failed", j.failed_head_steps}};
  for (const auto& [outcome, value] : outcomes)
    f.counter("head_steps", "Steps of query heads by outcome", value, {{"outcome", outcome}});
  for (size_t r = 0; r < j.rungs.size(); ++r)
    f.counter("head_step_rungs", "Steps of query heads by the highest rung reached", j.rungs[r],
              {{"rung", std::to_string(r)}});
  f.gauge("tolerance", "Largest error bound allowed", j.tolerance,
          {{"kind", j.tolerance_is_relative ? "relative" : "absolute"}});
  const std::pair<const char*, double> quantiles[] = {{"0.5", j.relative_p50},
                                                      {"0.95", j.relative_p95},
                                                      {"0.99", j.relative_p99},
                                                      {"1", j.relative_max}};
  for (const auto& [q, value] : quantiles)
    f.gauge("relative_bound", "Relative error bounds of the last step's head-steps", value,
            {{"quantile", q}});
  f.gauge("relative_bound_worst", "Largest relative error bound since the start", j.worst_relative);
  f.counter("canary_failures", "Canaries that failed", j.canary_failures);
  f.counter("digest_failures", "Digests that did not match", j.digest_failures);
  f.counter("paged_bytes", "Bytes of originals brought near the compute", j.paged_bytes);
}

void add_cluster(const StatusReport::Cluster& c, Families& f) {
  f.gauge("cluster_epoch", "Epoch of the view of this node", double(c.epoch));
  f.gauge("cluster_active", "1: this node may act for its view; 0: it is fenced", c.active);
  f.gauge("replication_lag_bytes", "Sealed here and not yet copied as often as asked",
          double(c.lag_bytes));
  f.gauge("replication_open_runs", "Runs of blocks with copies still to be made",
          double(c.open_runs));
  for (const StatusReport::Node& n : c.nodes)
    f.gauge("node_alive", "1: messages go to and fro with the node", n.alive, {{"node", n.name}});
  for (const StatusReport::Node& n : c.nodes)
    f.gauge("node_member", "1: the node belongs to the view", n.member, {{"node", n.name}});
  for (const StatusReport::Node& n : c.nodes)
    f.gauge("node_replication_lag_bytes", "As the node says", double(n.lag_bytes),
            {{"node", n.name}});
}

}  // namespace

std::string metrics_text(const StatusReport& r) {
  Families f;
  f.gauge("build_info", "Always 1", 1, {{"version", r.version}, {"role", r.role}});
  f.gauge("uptime_seconds", "Since the process began", r.uptime_seconds);
  f.gauge("ready", "1: it does its work", r.ready);
  for (const StatusReport::Memory& m : r.memory)
    f.gauge("memory_used_bytes", "In use", double(m.used_bytes), {{"memory", m.name}});
  for (const StatusReport::Memory& m : r.memory)
    f.gauge("memory_total_bytes", "Set aside", double(m.total_bytes), {{"memory", m.name}});
  for (const StatusReport::Memory& m : r.memory) {
    const double share = m.total_bytes == 0 ? 0 : double(m.used_bytes) / double(m.total_bytes);
    if (m.name == "tier1") f.gauge("kv_cache_usage_perc", "Share of tier 1 in use, 0 .. 1", share);
    if (m.name == "arena") f.gauge("arena_usage_perc", "Share of the arena in use, 0 .. 1", share);
  }
  if (r.job) add_job(*r.job, f);
  if (r.cluster) add_cluster(*r.cluster, f);
  for (const StatusReport::Counter& c : r.counters) f.counter(c.name, c.help, c.value);
  return f.text();
}

std::string status_json(const StatusReport& r) {
  json v = {{"role", r.role},   {"name", r.name},     {"version", r.version},
            {"ready", r.ready}, {"reason", r.reason}, {"uptime_seconds", figure(r.uptime_seconds)}};
  v["memory"] = json::array();
  for (const StatusReport::Memory& m : r.memory)
    v["memory"].push_back(
        {{"name", m.name}, {"used_bytes", m.used_bytes}, {"total_bytes", m.total_bytes}});
  if (r.cluster) {
    const StatusReport::Cluster& c = *r.cluster;
    // An epoch has 64 bits, a number in JavaScript 53.
    json nodes = json::array();
    for (const StatusReport::Node& n : c.nodes)
      nodes.push_back({{"name", n.name},
                       {"address", n.address},
                       {"self", n.self},
                       {"alive", n.alive},
                       {"member", n.member},
                       {"view", n.epoch >> 32},
                       {"epoch", std::to_string(n.epoch)},
                       {"lag_bytes", n.lag_bytes},
                       {"free_bytes", n.free_bytes},
                       {"silent_seconds", figure(n.silent_seconds)}});
    v["cluster"] = {{"view", c.epoch >> 32},
                    {"epoch", std::to_string(c.epoch)},
                    {"active", c.active},
                    {"lag_bytes", c.lag_bytes},
                    {"lag_limit_bytes", c.lag_limit_bytes},
                    {"open_runs", c.open_runs},
                    {"nodes", nodes}};
  }
  if (r.job) {
    const StatusReport::Job& j = *r.job;
    v["job"] = {{"lines", j.lines},
                {"finished", j.finished},
                {"failed", j.failed},
                {"running", j.running},
                {"waiting", j.waiting},
                {"steps", j.steps},
                {"generation_tokens", j.generation_tokens},
                {"prompt_tokens", j.prompt_tokens},
                {"tokens_per_second", figure(j.tokens_per_second)},
                {"prefill_share", figure(j.prefill_share)},
                {"outcomes",
                 {{"certified", j.certified},
                  {"exact", j.exact},
                  {"over", j.over},
                  {"failed", j.failed_head_steps}}},
                {"rungs", j.rungs},
                {"canary_failures", j.canary_failures},
                {"digest_failures", j.digest_failures},
                {"paged_bytes", j.paged_bytes},
                {"tolerance",
                 {{"kind", j.tolerance_is_relative ? "relative" : "absolute"},
                  {"value", figure(j.tolerance)}}},
                {"relative_bound",
                 {{"p50", figure(j.relative_p50)},
                  {"p95", figure(j.relative_p95)},
                  {"p99", figure(j.relative_p99)},
                  {"max", figure(j.relative_max)},
                  {"worst", figure(j.worst_relative)}}}};
  }
  v["counters"] = json::object();
  for (const StatusReport::Counter& c : r.counters) v["counters"][c.name] = c.value;
  // A name that is not UTF-8 must not be what keeps the rest from being read.
  return v.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace certkv
