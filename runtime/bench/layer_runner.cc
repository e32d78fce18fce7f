#include "runtime/bench/layer_runner.h"

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

double LayerRunner::step(const StepRules& rules, uint64_t number, std::span<const HeadTask> tasks) {
  const auto start = Clock::now();
  pool_.parallel_for(tasks.size(), [&](size_t i) {
    const HeadTask& t = tasks[i];
    const StepWhere where{0, 0, int(i), number};
    head_step(rules, where, query_heads_, t.q, t.state, t.head->originals, t.head->out.data(),
              nullptr, &t.head->report);
    if (t.rung3 != 0)
      dense_step(where, query_heads_, t.rung3, 3, t.q, t.state, t.head->originals,
                 t.head->out.data(), nullptr, &t.head->report);
  });
  return us_since(start);
}

std::optional<double> LayerRunner::pass(std::span<const HeadTask> tasks, bool certificate) {
  if (!certificate) return std::nullopt;  // its sums are always computed
  const auto start = Clock::now();
  pool_.parallel_for(tasks.size(), [&](size_t i) {
    const HeadTask& t = tasks[i];
    const QueryGroup q = make_query_group(query_heads_, format_->head_dim, t.q);
    attend_pass(context_, q, t.state->tier.blocks(), t.state->centre.data(), &t.head->pass);
  });
  return us_since(start);
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
  const Certificate judged =
      certify(context_, t.head->pass, 0, blocks, logs[0], t.head->out.data());
  us.all = us_since(start);
  CERTKV_EXPECT(sound && std::isfinite(judged.bound), Uncertifiable,
                "a measured correction was refused, or its bound is {}", judged.bound);
  return us;
}

}  // namespace certkv
