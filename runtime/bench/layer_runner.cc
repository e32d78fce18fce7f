#include "runtime/bench/layer_runner.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "runtime/certify/canary.h"

namespace certkv {
namespace {

using Clock = std::chrono::steady_clock;

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

}  // namespace

LayerRunner::LayerRunner(std::shared_ptr<const PageFormat> format, DType dtype, int query_heads,
                         ThreadPool& pool)
    : format_(std::move(format)),
      context_{format_.get(), dtype},
      query_heads_(query_heads),
      pool_(pool),
      before_(std::make_unique<BlockTerms>()),
      after_(std::make_unique<BlockTerms>()) {}

// Runs begin(task), then attend(task, first, last) for the splits of all tasks in one list, then
// finish(task), again while one says that it has splits left; returns microseconds.
template <typename Begin, typename Splits, typename Attend, typename Finish>
double LayerRunner::spread(size_t tasks, const Begin& begin, const Splits& splits,
                           const Attend& attend, const Finish& finish) {
  const auto start = Clock::now();
  pool_.parallel_for(tasks, begin);
  std::vector<char>& unfinished = unfinished_;  // written by several threads: not vector<bool>
  unfinished.assign(tasks, 1);
  for (bool more = true; more;) {
    list_.clear();
    for (size_t i = 0; i < tasks; ++i) list_.add(unfinished[i] != 0 ? splits(i) : 0);
    list_.run(pool_, attend);
    pool_.parallel_for(tasks, [&](size_t i) {
      if (unfinished[i] != 0) unfinished[i] = finish(i) ? 1 : 0;
    });
    more = std::find(unfinished.begin(), unfinished.end(), 1) != unfinished.end();
  }
  return us_since(start);
}

double LayerRunner::step(const StepRules& rules, uint64_t number, std::span<const HeadTask> tasks) {
  while (steps_.size() < tasks.size()) steps_.emplace_back();
  const auto where = [&](size_t i) { return StepWhere{0, 0, int(i), number}; };
  double us = spread(
      tasks.size(),
      [&](size_t i) {
        const HeadTask& t = tasks[i];
        steps_[i].begin(rules, where(i), query_heads_, t.q, t.state, t.head->originals,
                        t.head->out.data(), nullptr, &t.head->report);
      },
      [&](size_t i) { return steps_[i].splits(); },
      [&](size_t i, size_t first, size_t last) { steps_[i].attend(first, last); },
      [&](size_t i) { return steps_[i].finish(); });
  // Heads that are to be on rung 3 whatever their bound says, as a step would take them there.
  std::vector<size_t> forced;
  for (size_t i = 0; i < tasks.size(); ++i)
    if (tasks[i].rung3 != 0) forced.push_back(i);
  if (forced.empty()) return us;
  while (dense_.size() < forced.size()) dense_.push_back(std::make_unique<DenseStep>());
  return us + spread(
                  forced.size(),
                  [&](size_t n) {
                    const HeadTask& t = tasks[forced[n]];
                    dense_[n]->begin(where(forced[n]), query_heads_, t.rung3, t.q, t.state,
                                     t.head->originals);
                  },
                  [&](size_t n) { return dense_[n]->splits(); },
                  [&](size_t n, size_t first, size_t last) { dense_[n]->attend(first, last); },
                  [&](size_t n) {
                    const HeadTask& t = tasks[forced[n]];
                    dense_[n]->finish(3, t.head->out.data(), nullptr, &t.head->report);
                    return false;
                  });
}

std::optional<double> LayerRunner::pass(std::span<const HeadTask> tasks, bool certificate) {
  queries_.resize(std::max(queries_.size(), tasks.size()));
  const auto blocks = [&](size_t i) { return tasks[i].state->tier.blocks(); };
  return spread(
      tasks.size(),
      [&](size_t i) {
        make_query_group(query_heads_, format_->head_dim, tasks[i].q, &queries_[i]);
        attend_begin(context_, queries_[i], blocks(i), {.certificate = certificate},
                     &tasks[i].head->pass);
      },
      [&](size_t i) { return attend_splits(context_, blocks(i).size()); },
      [&](size_t i, size_t first, size_t last) {
        attend_some(context_, queries_[i], blocks(i), first, last, &tasks[i].head->pass);
      },
      [&](size_t i) {
        attend_merge(&tasks[i].head->pass);
        return false;
      });
}

LayerRunner::Correction LayerRunner::correct(const HeadTask& t, size_t count) {
  const std::span<const BlockRef> blocks = t.state->tier.blocks();
  std::vector<uint32_t> chosen;
  for (size_t b = 0; b < blocks.size(); ++b)
    if (blocks[b].page != nullptr && blocks[b].k == nullptr && blocks[b].v == nullptr)
      chosen.push_back(uint32_t(b));
  CERTKV_EXPECT(chosen.size() >= count, InvalidArgument,
                "a context of {} tokens has no {} blocks to correct outside F and X",
                t.state->tier.tokens(), count);
  for (size_t i = 0; i < count; ++i)  // spread over the context
    chosen[i] = chosen[i * chosen.size() / count];
  chosen.resize(count);
  const size_t elements = size_t(format_->block_tokens) * size_t(format_->head_dim);
  k_.resize(count * elements);
  v_.resize(count * elements);
  const QueryGroup q = make_query_group(query_heads_, format_->head_dim, t.q);
  std::vector<CorrectionLog> logs(static_cast<size_t>(query_heads_));
  std::vector<Destination> to(count);
  std::vector<BlockResult> results;
  bool sound = true;

  const auto start = Clock::now();
  for (size_t i = 0; i < count; ++i)
    to[i] = {.k = k_.data() + i * elements, .v = v_.data() + i * elements};
  t.head->originals.read(chosen, to, &results);
  Correction us{.read = us_since(start)};
  for (size_t i = 0; i < count; ++i) {
    const BlockRef& was = blocks[chosen[i]];
    BlockRef now = was;
    now.k = results[i].k;
    now.v = results[i].v;
    sound = results[i].status == BlockStatus::Ok &&
            correct_block(context_, q, chosen[i], was, now, 1, &t.head->pass, logs, before_.get(),
                          after_.get()) &&
            sound;
    const auto asked = Clock::now();
    sound = canary(context_, query_heads_, *before_, *after_, was, now).ok && sound;
    us.canary += us_since(asked);
  }
  finish_output(t.head->pass, 0, t.head->out.data());
  const Certificate judged = certify(t.head->pass, 0, logs[0], t.head->out.data());
  us.all = us_since(start);
  CERTKV_EXPECT(sound && std::isfinite(judged.bound), Uncertifiable,
                "a measured correction was refused, or its bound is {}", judged.bound);
  return us;
}

}  // namespace certkv
