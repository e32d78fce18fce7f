// What a process says about itself over HTTP: one plain record, from which the status page, the
// JSON and the metrics are made.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/arith/verdict.h"

namespace certkv {

struct StatusReport {
  std::string role;  // job, or store
  std::string name;  // of the process among its like: "rank 0 of 4", a node's name
  std::string version;
  double uptime_seconds = 0;
  bool ready = false;
  std::string reason;  // why it is not ready

  struct Memory {
    std::string name;  // arena, tier1
    uint64_t used_bytes = 0, total_bytes = 0;
  };
  std::vector<Memory> memory;

  struct Node {
    std::string name, address;
    bool self = false, alive = false, member = false;
    uint64_t epoch = 0, lag_bytes = 0, free_bytes = 0;
    double silent_seconds = -1;  // since its last message; -1: never heard
  };
  struct Cluster {
    uint64_t epoch = 0;
    bool active = false;                          // not fenced
    uint64_t lag_bytes = 0, lag_limit_bytes = 0;  // of this node; limit 0: none
    uint64_t open_runs = 0;                       // with copies still to be made
    std::vector<Node> nodes;
  };
  std::optional<Cluster> cluster;

  // Head-steps are counted over query heads of all ranks.
  struct Job {
    uint64_t lines = 0, finished = 0, failed = 0, running = 0, waiting = 0;
    uint64_t steps = 0, generation_tokens = 0, prompt_tokens = 0;
    double tokens_per_second = 0;  // of late
    double prefill_share = -1;     // of the prompt that is being read; negative: none is
    uint64_t certified = 0, exact = 0, over = 0, failed_head_steps = 0;
    std::array<uint64_t, kRungs> rungs{};
    uint64_t canary_failures = 0, digest_failures = 0, paged_bytes = 0;
    double tolerance = 0;
    bool tolerance_is_relative = true;
    // Relative bounds of what was returned, over the head-steps of the last step.
    double relative_p50 = 0, relative_p95 = 0, relative_p99 = 0, relative_max = 0;
    double worst_relative = 0;  // since the process began
  };
  std::optional<Job> job;

  struct Counter {
    std::string name, help;  // stem after the prefix, in snake case
    uint64_t value = 0;
  };
  std::vector<Counter> counters;  // whatever else the process counts
};

// The object of /v1/status. What is not finite becomes the string "nan", "inf" or "-inf".
std::string status_json(const StatusReport& report);
// Prometheus's text format 0.0.4, names certkv:<stem> with vLLM's stems where vLLM has the figure.
std::string metrics_text(const StatusReport& report);
// The page of `/`: one document, without a reference to anything outside it.
const char* status_page();

}  // namespace certkv
