// A report in which every figure differs from every other, so that no test takes one for another.
#pragma once

#include "kvstore/http/status_report.h"

namespace certkv::test {

inline StatusReport sample_report() {
  StatusReport r;
  r.role = "job";
  r.name = "rank 0 of 4";
  r.version = "1.2.3";
  r.uptime_seconds = 3725;
  r.ready = true;
  r.memory = {{"arena", 3'221'225'472, 8'589'934'592}, {"tier1", 1'610'612'736, 4'294'967'296}};
  StatusReport::Cluster c;
  c.epoch = uint64_t(41) << 32 | 12345;
  c.active = true;
  c.lag_bytes = 5'242'880;
  c.lag_limit_bytes = 67'108'864;
  c.open_runs = 17;
  c.nodes = {{"alpha", "10.0.0.1:7400", true, true, true, c.epoch, 5'242'880, 5'368'709'120, 0},
             {"beta", "10.0.0.2:7400", false, true, true, c.epoch, 1'048'576, 6'442'450'944, 0.2},
             {"gamma", "10.0.0.3:7400", false, true, false, 0, 0, 8'589'934'592, 0.4},
             {"<b>delta</b>", "10.0.0.4:7400", false, false, false, 0, 0, 0, -1}};
  r.cluster = c;
  StatusReport::Job j;
  j.lines = 500;
  j.finished = 123;
  j.failed = 2;
  j.running = 8;
  j.waiting = 369;
  j.steps = 45678;
  j.generation_tokens = 365421;
  j.prompt_tokens = 4030201;
  j.tokens_per_second = 41.25;
  j.prefill_share = 0.375;
  j.certified = 9000001;
  j.exact = 70002;
  j.over = 0;
  j.failed_head_steps = 0;
  j.rungs = {8500000, 400001, 100000, 70000, 2};
  j.paged_bytes = 987654321;
  j.tolerance = 0.05;
  j.relative_p50 = 0.0101;
  j.relative_p95 = 0.0311;
  j.relative_p99 = 0.0402;
  j.relative_max = 0.0451;
  j.worst_relative = 0.0487;
  r.job = j;
  r.counters = {{"blocks_served", "Blocks sent to other nodes", 271828}};
  return r;
}

}  // namespace certkv::test
