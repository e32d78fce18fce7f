// The inner loops of the pass, per instruction set (0: what every machine has, 1: the best here).
// Tied to kernels/cpu/attend_tiles.h.
#include <benchmark/benchmark.h>

#include "kernels/cpu/attend_tiles.h"
#include "kernels/quantize.h"
#include "tests/bench/bench_data.h"

namespace certkv::bench {
namespace {

using State = benchmark::State;

const cpu::TileKernels& kernels_of(State& state) {
  const cpu::TileKernels& k =
      state.range(0) == 0 ? cpu::tile_kernels_baseline() : cpu::tile_kernels();
  state.SetLabel(k.isa);
  return k;
}

// Scores of 16 tokens' codes for 4 heads.
void score_codes(State& state) {
  const cpu::TileKernels& k = kernels_of(state);
  const Data data("compact");
  const std::byte* page = data.tier.blocks()[0].page;
  std::vector<float> step(data.query.scaled.size()), scores(kHeads * 16);
  for (size_t i = 0; i < step.size(); ++i)
    step[i] = data.query.scaled[i] * served_key_affine(*data.format, page, int(i) % kHeadDim).step;
  const float base[kHeads] = {};
  for (auto _ : state) {
    k.score_codes(*data.format, page, 0, kHeads, step.data(), base, scores.data(), 16);
    benchmark::DoNotOptimize(scores.data());
  }
  state.SetBytesProcessed(state.iterations() * 16 * kHeadDim);
}
BENCHMARK(score_codes)->ArgName("isa")->Arg(0)->Arg(1);

void score_originals(State& state) {
  const cpu::TileKernels& k = kernels_of(state);
  const Data data("compact");
  std::vector<float> scores(kHeads * 16);
  for (auto _ : state) {
    k.score_originals(DType::F16, kHeadDim, data.head.k.data(), 16, kHeads,
                      data.query.scaled.data(), scores.data(), 16);
    benchmark::DoNotOptimize(scores.data());
  }
  state.SetBytesProcessed(state.iterations() * 32 * kHeadDim);
}
BENCHMARK(score_originals)->ArgName("isa")->Arg(0)->Arg(1);

void weigh(State& state) {
  const cpu::TileKernels& k = kernels_of(state);
  float scores[16], p[16];
  for (int i = 0; i < 16; ++i) scores[i] = -0.3f * float(i);
  for (auto _ : state) benchmark::DoNotOptimize(k.weigh(scores, 16, 0, p));
}
BENCHMARK(weigh)->ArgName("isa")->Arg(0)->Arg(1);

// 16 tokens' values for 4 heads, with the sums of the certificate. from: 0 codes, 1 originals.
void values(State& state) {
  const cpu::TileKernels& k = kernels_of(state);
  const bool originals = state.range(1) == 1;
  const Data data("compact");
  std::vector<float> p(kHeads * 16, 0.01f), o(kHeads * kMaxHeadDim), centre(kHeadDim, 0.1f);
  float m2[kHeads] = {}, big_a[kHeads] = {}, s1[kHeads] = {};
  for (auto _ : state) {
    k.weigh_values(*data.format, DType::F16, data.tier.blocks()[0].page, 0,
                   originals ? data.head.v.data() : nullptr, 1, 16, kHeads, p.data(), centre.data(),
                   o.data(), kMaxHeadDim, m2, big_a, s1);
    benchmark::DoNotOptimize(o.data());
  }
  state.SetBytesProcessed(state.iterations() * 16 * kHeadDim * (originals ? 4 : 1) / 2);
}
BENCHMARK(values)->ArgNames({"isa", "from"})->ArgsProduct({{0, 1}, {0, 1}});

}  // namespace
}  // namespace certkv::bench
