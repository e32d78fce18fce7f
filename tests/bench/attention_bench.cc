// Sealing, digests, the pass and what the certificate does with it. Arguments named `layout` are
// 0 compact, 1 balanced, 2 paper. One thread; 4 query heads share a KV head of 128.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kernels/base/thread_pool.h"
#include "kernels/digest.h"
#include "kernels/prefill_attention.h"
#include "kernels/quantize.h"
#include "runtime/certify/canary.h"
#include "runtime/certify/certificate.h"
#include "tests/bench/bench_data.h"

namespace certkv::bench {
namespace {

using State = benchmark::State;

void with_layouts(benchmark::internal::Benchmark* b) {
  b->ArgName("layout")->Arg(0)->Arg(1)->Arg(2);
}

// One scale group. Bytes: of originals, read.
void seal(State& state) {
  const Data data(layout_of(state.range(0)));
  const PageFormat& f = *data.format;
  const std::unique_ptr<void, void (*)(void*)> page(
      std::aligned_alloc(64, (f.page_bytes + 63) / 64 * 64), std::free);
  for (auto _ : state)
    benchmark::DoNotOptimize(seal_page(f, DType::F16, data.head.k.data(), data.head.v.data(),
                                       static_cast<std::byte*>(page.get())));
  state.SetBytesProcessed(state.iterations() * 4 * f.group_tokens * f.head_dim);
}
BENCHMARK(seal)->Apply(with_layouts);

// The open block's annotations, at every token.
void annotate_open_block(State& state) {
  const Data data("compact");
  BlockAnnotations note;
  for (auto _ : state)
    benchmark::DoNotOptimize(annotate_originals(*data.format, DType::F16, data.head.k.data(),
                                                data.head.v.data(), kBlock, &note));
}
BENCHMARK(annotate_open_block);

void digest(State& state) {
  const std::vector<uint64_t> bytes(size_t(state.range(0)) / 8, 7);
  for (auto _ : state) benchmark::DoNotOptimize(payload_digest(bytes.data(), bytes.size() * 8));
  state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(digest)->ArgName("bytes")->Arg(kBlock* kHeadDim * 2)->Arg(15360);

void copy_with_digest(State& state) {
  const std::vector<uint64_t> from(size_t(state.range(0)) / 8, 7);
  std::vector<uint64_t> to(from.size());
  for (auto _ : state)
    benchmark::DoNotOptimize(copy_and_digest(to.data(), from.data(), from.size() * 8));
  state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(copy_with_digest)->ArgName("bytes")->Arg(kBlock* kHeadDim * 2);

// The pass over 2048 tokens of codes. Bytes: of tier 1.
void pass(State& state) {
  const Data data(layout_of(state.range(0)));
  PassState result;
  for (auto _ : state)
    attend_pass(data.context(), data.query, data.tier.blocks(), &result);
  state.SetBytesProcessed(
      int64_t(double(state.iterations()) * double(kTokens) * data.format->bytes_per_token()));
}
BENCHMARK(pass)->Apply(with_layouts);

// Scores and weighted values of one block: keys and values each from codes (0) or originals (1).
// Bytes: of what is read, metadata apart.
void block(State& state) {
  const Data data("compact");
  constexpr size_t kAt = 7;
  BlockRef ref = data.tier.blocks()[kAt];
  int64_t bytes = 0;
  for (const int tensor : {0, 1}) {
    const bool original = state.range(tensor) == 1;
    const TensorPlanes& codes = tensor == 0 ? data.format->layout.key : data.format->layout.value;
    bytes += kBlock * kHeadDim * (original ? 16 : codes.base_bits()) / 8;
    if (original && tensor == 0) ref.k = data.originals[kAt].k;
    if (original && tensor == 1) ref.v = data.originals[kAt].v;
  }
  const auto terms = std::make_unique<BlockTerms>();
  for (auto _ : state) {
    std::fill_n(terms->ref, kHeads, -1e30f);
    block_terms(data.context(), data.query, ref, 1, true, terms.get());
    benchmark::DoNotOptimize(terms->o);
  }
  state.SetBytesProcessed(state.iterations() * bytes);
}
BENCHMARK(block)->ArgNames({"keys", "values"})->ArgsProduct({{0, 1}, {0, 1}});

// One block's served values against its originals.
void errors_of_values(State& state) {
  const Data data(layout_of(state.range(0)));
  constexpr size_t kAt = 7;
  const BlockRef& block = data.tier.blocks()[kAt];
  for (auto _ : state)
    benchmark::DoNotOptimize(
        value_errors(*data.format, block.page, block.index, DType::F16, data.originals[kAt].v));
}
BENCHMARK(errors_of_values)->Apply(with_layouts);

// Both sides of a block against each other.
void canary_of_one_block(State& state) {
  const Data data("compact");
  constexpr size_t kAt = 7;
  const BlockRef codes = data.tier.blocks()[kAt];
  BlockRef exact = codes;
  exact.k = data.originals[kAt].k;
  exact.v = data.originals[kAt].v;
  const auto before = std::make_unique<BlockTerms>(), after = std::make_unique<BlockTerms>();
  for (BlockTerms* t : {before.get(), after.get()}) {
    std::fill_n(t->ref, kHeads, -1e30f);
    block_terms(data.context(), data.query, t == before.get() ? codes : exact, 1,
                true, t);
  }
  for (auto _ : state)
    if (!canary(data.context(), kHeads, *before, *after, codes, exact).ok) {
      state.SkipWithError("the canary saw damage");
      break;
    }
}
BENCHMARK(canary_of_one_block);

// The pass over originals: what rungs 3 and 4 and policy dense run. Bytes: of originals.
void dense(State& state) {
  const Data data("compact");
  PassState result;
  for (auto _ : state)
    attend_pass(data.context(), data.query, data.originals, &result);
  state.SetBytesProcessed(state.iterations() * int64_t(kTokens) * 4 * kHeadDim);
}
BENCHMARK(dense);

// One query head, 128 blocks.
void certify_and_judge(State& state) {
  const Data data("compact");
  PassState pass;
  attend_pass(data.context(), data.query, data.tier.blocks(), &pass);
  std::vector<float> out(kHeadDim);
  for (auto _ : state) {
    finish_output(pass, 0, out.data());
    const Certificate c = certify(pass, 0, {}, out.data());
    benchmark::DoNotOptimize(within_tolerance(c, true, 0.05));
  }
}
BENCHMARK(certify_and_judge);

// Keys and values of one block, back and forth between codes and originals, for one query head.
void correct_one_block(State& state) {
  const Data data("compact");
  const std::span<const BlockRef> blocks = data.tier.blocks();
  PassState fresh;
  attend_pass(data.context(), data.query, blocks, &fresh);
  PassState pass = fresh;
  std::vector<CorrectionLog> logs(kHeads);
  const auto before = std::make_unique<BlockTerms>(), after = std::make_unique<BlockTerms>();
  size_t at = 0;  // a block is promoted once
  for (auto _ : state) {
    if (blocks[at].page == nullptr) {
      state.PauseTiming();
      pass = fresh;
      at = 0;
      state.ResumeTiming();
    }
    BlockRef exact = blocks[at];
    exact.k = data.originals[at].k;
    exact.v = data.originals[at].v;
    if (!correct_block(data.context(), data.query, at, blocks[at], exact, 1, &pass, logs,
                       before.get(), after.get())) {
      state.SkipWithError("a correction was refused");
      break;
    }
    ++at;
  }
}
BENCHMARK(correct_one_block);

// Floating-point operations of the pairs that the causal mask leaves.
void prefill(State& state) {
  const Data data("compact");
  ThreadPool pool(1);
  const auto rows = size_t(state.range(0));
  const size_t width = size_t(kHeads * kHeadDim);
  std::vector<float> q(rows * width), out(rows * width);
  for (size_t i = 0; i < q.size(); ++i) q[i] = data.head.q[i % data.head.q.size()];
  const PrefillAttention a{.q = q.data(),
                           .q_group_stride = rows * width,
                           .q_row_stride = width,
                           .k = data.head.k.data(),
                           .v = data.head.v.data(),
                           .kv_head_stride = kTokens * kHeadDim,
                           .dtype = DType::F16,
                           .out = out.data(),
                           .out_group_stride = rows * width,
                           .out_row_stride = width,
                           .rows = rows,
                           .kv_heads = 1,
                           .heads_per_group = kHeads,
                           .head_dim = kHeadDim};
  for (auto _ : state) prefill_attention(a, pool);
  const double pairs = double(rows) * double(rows + 1) / 2;
  state.counters["flops"] = benchmark::Counter(4.0 * kHeadDim * kHeads * pairs,
                                               benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(prefill)->ArgName("tokens")->Arg(512)->Arg(kTokens)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace certkv::bench
