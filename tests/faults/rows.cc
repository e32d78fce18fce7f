// The faults that are injected into a job in this process.
#include <fmt/format.h>

#include <cstring>
#include <thread>

#include "kernels/base/failpoint.h"
#include "kvstore/client.h"
#include "tests/faults/worker.h"
#include "tests/kvstore/raw_client.h"

namespace certkv::faults {
namespace {

using std::chrono::milliseconds;
using Job = Bench::Job;

constexpr uint64_t kPages = 140;  // 5 layers, 4 KV heads, 7 pages of a prompt of 474 tokens
constexpr uint64_t kSteps = 6;

// `point` with an action, somewhere in its first `hits` hits, `most` times at most.
std::string at(Draw& draw, const std::string& point, const std::string& action, uint64_t hits,
               uint64_t most = 1) {
  return fmt::format("{}={},skip={},count={},seed={}", point, action, draw.below(hits),
                     draw.between(1, most), draw.bits() >> 1);
}

// One bit, or a NaN, in tier 1, between two steps and before the next look at it.
Outcome tier1(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const char* action = draw.chance(0.2) ? "nan" : "corrupt";
  switch (draw.below(5)) {
    case 0:
      job.failpoints = at(draw, "tier.page", action, kPages, 4);
      break;
    case 1:
      job.failpoints = at(draw, "tier.table", "corrupt", kPages, 4);
      break;
    case 2:
      job.failpoints = at(draw, "scratch.rot", action, 200, 4);
      break;
    default:
      job.failpoints = at(draw, "tier.rot", action, kPages * kSteps, 6);
  }
  return bench.run(job, draw);
}

// The same while it is read, or under the default period of the scrub.
Outcome tier1_window(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  job.scrub_steps = draw.chance(0.5) ? 256 : 1;
  job.may_be_in_doubt = true;
  job.failpoints = job.scrub_steps == 1 ? at(draw, "scratch.slot", "corrupt", 120, 8)
                                        : at(draw, "tier.rot", "corrupt", kPages * kSteps, 40);
  return bench.run(job, draw);
}

// Rows that are not sealed yet: no copy of them exists.
Outcome open_rows(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  job.failpoints =
      at(draw, "tier.open", draw.chance(0.2) ? "nan" : "corrupt", 20 * kSteps - 20, 2);
  return bench.run(job, draw);
}

// Bits of the arena, through another mapping of it.
Outcome arena_bits(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const uint64_t at_step = draw.below(kSteps), flips = draw.between(1, 200);
  job.between = [&](const StoreClient& store, uint64_t step) {
    if (step != at_step) return;
    const std::span<const std::byte> arena = store.arena();
    // What lies there begins at the start: most flips fall into a block.
    const uint64_t used = std::min<uint64_t>(arena.size(), uint64_t(3) << 20);
    for (uint64_t i = 0; i < flips; ++i) {
      auto* byte = const_cast<std::byte*>(arena.data() + draw.below(used));
      *byte ^= std::byte(1u << draw.below(8));
    }
  };
  return bench.run(job, draw);
}

// A block at its sealing or reading: payload, header, seal, digest.
Outcome blocks(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const std::string point = draw.of<std::string>(
      {"client.payload", "client.header", "reader.source", "reader.header", "reader.seal"});
  job.failpoints = at(draw, point, "corrupt", 500, 8);
  return bench.run(job, draw);
}

Outcome unsealed(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const std::string kind = draw.of<std::string>({"IoError", "Corrupt", "OutOfMemory"});
  job.failpoints =
      at(draw, draw.of<std::string>({"client.publish", "client.seal"}), "error:" + kind, 560);
  return bench.run(job, draw);
}

Outcome lost(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  job.failpoints =
      draw.chance(0.7)
          ? at(draw, "reader.lost", "force", 500, 40)
          : at(draw, "reader.batch",
               "error:" + draw.of<std::string>({"StoreLost", "IoError", "DeadlineExceeded"}),
               80);
  return bench.run(job, draw);
}

Outcome not_a_number(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const std::string point =
      draw.of<std::string>({"cache.key", "cache.value", "cache.query", "cache.output"});
  job.failpoints = at(draw, point, "nan", 20 * kSteps / 2, 3);
  return bench.run(job, draw);
}

Outcome memory(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const std::string refused = "error:OutOfMemory";
  switch (draw.below(5)) {
    case 0:
      job.failpoints = at(draw, "tier.allocate", refused, kPages);
      break;
    case 1:
      job.failpoints = at(draw, "cache.create", refused, 1);
      break;
    case 2:
      job.failpoints = at(draw, "cache.fork", refused, 1);
      break;
    case 3:
      job.failpoints = at(draw, "holder.full", "force", 2);
      break;
    default:
      job.arena_bytes = draw.between(uint64_t(8) << 10, uint64_t(6) << 20);
  }
  return bench.run(job, draw);
}

// Quota of the scratch: what does not fit goes dense.
Outcome scratch_quota(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  job.failpoints = at(draw, "scratch.full", "force", 60, 100);
  return bench.run(job, draw);
}

// A rank that does not come: the other names it within its deadline.
Outcome hang(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = 2;
  job.silence = milliseconds(400);
  const uint64_t pause = draw.between(20, 1200);
  job.failpoints = at(draw, "ranks.wait", fmt::format("sleep:{}", pause), 40);
  const auto begin = std::chrono::steady_clock::now();
  Outcome outcome = bench.run(job, draw);
  // The sleeper is a thread of this process, which cannot end before it wakes.
  const auto most = milliseconds(pause) + job.silence * 2 + milliseconds(4000);
  if (std::chrono::steady_clock::now() - begin > most)
    outcome = {Outcome::Result::Violation, "late: " + outcome.text};
  return outcome;
}

Outcome rank_dies(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = 2;
  const std::string point = draw.of<std::string>(
      {"engine.step", "engine.plan", "engine.admit", "engine.prefill", "engine.decode",
       "engine.agree", "engine.sample", "engine.finish", "cache.verdict", "ranks.wait"});
  const bool once =
      point == "engine.admit" || point == "engine.prefill" || point == "engine.finish";
  job.failpoints =
      at(draw, point,
         "error:" + draw.of<std::string>({"CommError", "Corrupt", "IoError", "StoreLost"}),
         once ? 2 : 10);
  return bench.run(job, draw);
}

// Damage between a rank and its store, both ways.
Outcome channel(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  job.silence = milliseconds(2000);
  const std::string point =
      draw.of<std::string>({"client.send", "client.receive", "client.attach", "client.offset",
                            "arena.header", "holder.header", "holder.payload", "holder.reply"});
  const bool once = point == "client.attach" || point == "arena.header";
  job.failpoints = at(draw, point, "corrupt", once ? 1 : 4, 2);
  return bench.run(job, draw);
}

Outcome store_gone(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  job.silence = milliseconds(2000);
  job.store_ends_after = draw.below(kSteps);
  return bench.run(job, draw);
}

// A slow store or rank: slower, never wrong.
Outcome slow(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const std::string point = draw.of<std::string>(
      {"holder.allocate", "holder.reply", "holder.payload", "client.receive", "client.reserve",
       "client.seal", "reader.batch", "engine.decode", "cache.fork", "ranks.wait"});
  job.failpoints = at(draw, point, fmt::format("sleep:{}", draw.between(1, 60)), 1, 3);
  return bench.run(job, draw);
}

// Strangers at the store's socket while a job runs.
Outcome garbage(Bench& bench, Draw& draw) {
  Job job;
  job.ranks = int(draw.between(1, 2));
  const uint64_t seed = draw.bits();
  job.beside = [seed](const std::string& socket, const std::atomic<bool>& done) {
    Draw own(seed);
    std::vector<std::unique_ptr<test::RawClient>> half_open;
    while (!done) {
      auto client = std::make_unique<test::RawClient>(socket);
      std::vector<std::byte> bytes(own.between(1, 400));
      for (std::byte& b : bytes) b = std::byte(own.bits());
      if (own.chance(0.5)) {  // a frame that is right but for what it claims
        bytes = make_frame(uint16_t(own.below(9)), ControlStatus::Ok, own.below(4), own.below(5),
                           std::span(bytes).first(std::min<size_t>(bytes.size(), 200)));
        if (own.chance(0.5)) bytes.resize(own.between(1, bytes.size()));
      }
      client->send_bytes(bytes);
      if (half_open.size() < 40 && own.chance(0.3)) half_open.push_back(std::move(client));
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  };
  return bench.run(job, draw);
}

}  // namespace

const std::vector<Row>& rows() {
  static const std::vector<Row> list = {
      {"tier1", 5, "bits and NaN in codes, scales, table and scratch, between steps", 0.17, tier1},
      {"tier1-window", 5, "the same within a step, or with the default scrub period", 0.03,
       tier1_window},
      {"open-rows", 5, "bits of rows that are not sealed yet", 0.04, open_rows},
      {"arena-bits", 6, "bits of the arena, through a second mapping", 0.14, arena_bits},
      {"blocks", 6, "a block's payload, header or seal", 0.14, blocks},
      {"unsealed", 1, "a block that is written and never sealed", 0.03, unsealed},
      {"lost", 6, "originals that are lost, reads that fail", 0.06, lost},
      {"memory", 8, "memory and space that are refused", 0.05, memory},
      {"scratch-quota", 10, "no room near the compute", 0.03, scratch_quota},
      {"hang", 11, "a rank that does not come to a collective", 0.01, hang},
      {"rank-dies", 12, "a rank that fails in the middle of a step", 0.06, rank_dies},
      {"slow", 13, "a slow store, a slow rank", 0.03, slow},
      {"nan", 14, "NaN in q, k, v and in an output", 0.06, not_a_number},
      {"channel", 20, "damage between a rank and its store", 0.05, channel},
      {"garbage", 18, "garbage and half frames on the store's socket", 0.03, garbage},
      {"store-gone", 1, "the store ends in the middle of a job", 0.02, store_gone},
      {"stale", 21, "identities of blocks that are gone, or another's", 0.03, stale_generation},
      {"files", 15, "truncated and altered weights, configuration, tokenizer", 0.02, model_files},
  };
  return list;
}

}  // namespace certkv::faults
