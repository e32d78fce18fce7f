#include "runtime/certify/learn.h"

#include <algorithm>
#include <cmath>

#include "kernels/arith/counter.h"
#include "kernels/quantize.h"
#include "runtime/certify/selector.h"

namespace certkv {
namespace {

constexpr double kDecay = 0.85;  // a block idle for 20 steps keeps 4 % of its score
constexpr double kKeepShare =
    0.25;  // all dropped blocks together would cost a quarter of the budget

}  // namespace

void learn(const AttendContext& context, const PassState& pass, std::span<const BlockRef> blocks,
           std::span<const double> allowed, bool by_mass, HeadState* state) {
  // Mass of one block under a head's pass. What a resident block's codes would have cost is known
  // from their score bound, which the pass keeps also where it used originals.
  const auto rho = [&](size_t h, uint32_t b) {
    const size_t i = pass.at(int(h), b);
    return pass.block_sum[i] * std::exp(double(pass.block_ref[i]) - pass.head[h].m) /
           pass.head[h].l;
  };
  state->keys.for_each([&](uint32_t b) {
    double now = 0;
    for (size_t h = 0; h < allowed.size(); ++h) {
      const double c_b = c_of_delta(pass.score_bound[pass.at(int(h), b)] + float(kEpsW));
      now = std::max(now,
                     c_b * rho(h, b) * 2 * blocks[b].nu / allowed[h]);  // ||O|| is about nu at most
    }
    state->keys.score(b, now);
  });
  state->values.for_each([&](uint32_t b) {
    double now = 0;
    const double eta = page_annotations(*context.format, blocks[b].page, blocks[b].index).eta;
    for (size_t h = 0; h < allowed.size(); ++h) now = std::max(now, rho(h, b) * eta / allowed[h]);
    state->values.score(b, now);
  });
  const auto keep = [](const ScratchCache& c) {
    return kKeepShare / double(std::max<size_t>(c.capacity(), 1));
  };
  state->keys.unpin_all();
  state->values.unpin_all();
  std::vector<uint32_t>& dropped = state->dropped;
  state->keys.age(kDecay, keep(state->keys), &dropped);
  for (uint32_t b : dropped) state->tier.use_key(b, nullptr);
  state->values.age(kDecay, keep(state->values), &dropped);
  for (uint32_t b : dropped) state->tier.use_value(b, nullptr);
  if (by_mass) {  // the published policy scores everything from codes at every step
    state->keys.for_each([&](uint32_t b) { state->tier.use_key(b, nullptr); });
    state->values.for_each([&](uint32_t b) { state->tier.use_value(b, nullptr); });
  }
}

uint64_t counter_seed(uint64_t seed, const StepWhere& where) {
  return mix_counter(mix_counter(seed, uint64_t(where.step)),
                     uint64_t(where.layer) << 32 | uint32_t(where.kv_head));
}

double counter_uniform(uint64_t seed, const StepWhere& where, uint32_t block) {
  return double(mix_counter(counter_seed(seed, where), uint64_t(block)) >> 11) * 0x1p-53;
}

bool same_order_under_codes(const PassState& pass, int head, std::span<const double> scored,
                            int r) {
  std::vector<uint32_t> inside;
  for (size_t b = 0; b < pass.blocks; ++b)
    if ((pass.used[pass.at(head, b)] & kUsedKey) != 0) inside.push_back(uint32_t(b));
  const size_t n = std::min(inside.size(), size_t(std::max(r, 0)));
  std::vector<uint32_t> by_codes = inside;
  const auto heavier = [](auto mass) {
    return [mass](uint32_t a, uint32_t b) {
      const double x = mass(a), y = mass(b);
      return x != y ? x > y : a < b;
    };
  };
  std::sort(inside.begin(), inside.end(),
            heavier([&](uint32_t b) { return block_log_mass(pass, head, b); }));
  std::sort(by_codes.begin(), by_codes.end(), heavier([&](uint32_t b) { return scored[b]; }));
  return std::equal(inside.begin(), inside.begin() + long(n), by_codes.begin());
}

}  // namespace certkv
