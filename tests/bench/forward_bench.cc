// The transformer's operations besides attention, and sampling. One thread.
#include <benchmark/benchmark.h>

#include <cmath>

#include "kernels/activation.h"
#include "kernels/base/thread_pool.h"
#include "kernels/linear.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"

namespace certkv::bench {
namespace {

using State = benchmark::State;

std::vector<float> numbers(size_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = float(i % 251) / 251 - 0.5f;
  return x;
}

void norm(State& state) {
  const auto n = size_t(state.range(0));
  const std::vector<float> x = numbers(n), weight = numbers(n);
  std::vector<float> y(n);
  for (auto _ : state) {
    rms_norm(x.data(), n, 1, n, weight.data(), 1e-5f, y.data(), n);
    benchmark::DoNotOptimize(y.data());
  }
  state.SetBytesProcessed(state.iterations() * state.range(0) * 4);
}
BENCHMARK(norm)->ArgName("n")->Arg(4096);

void rope(State& state) {
  RopeTable table;
  table.fill(rope_frequencies(5e5, 128), 1, 1000, 1);
  std::vector<float> x = numbers(32 * 128);
  for (auto _ : state) {
    rope_rotate(table, 0, x.data(), 32);
    benchmark::DoNotOptimize(x.data());
  }
  state.SetItemsProcessed(state.iterations() * 32);  // heads
}
BENCHMARK(rope);

void gate(State& state) {
  constexpr size_t kWidth = 14336;
  const std::vector<float> gate_up = numbers(2 * kWidth);
  std::vector<float> out(kWidth);
  for (auto _ : state) {
    silu_and_multiply(gate_up.data(), 1, kWidth, out.data(), kWidth);
    benchmark::DoNotOptimize(out.data());
  }
  state.SetBytesProcessed(state.iterations() * int64_t(kWidth) * 8);
}
BENCHMARK(gate);

// A prefill's product: rows x 1024 by 1024 x 1024.
void gemm(State& state) {
  constexpr size_t kN = 1024;
  const auto rows = size_t(state.range(0));
  const std::vector<float> x = numbers(rows * kN), w = numbers(kN * kN);
  std::vector<float> y(rows * kN);
  for (auto _ : state) linear_tile({w.data(), nullptr, kN, kN}, x.data(), kN, rows, y.data(), kN);
  state.counters["flops"] = benchmark::Counter(2.0 * double(rows) * kN * kN,
                                               benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(gemm)->ArgName("rows")->Arg(64)->Arg(512)->Unit(benchmark::kMicrosecond);

// A decode step's product. Bytes: of weights.
void gemv(State& state) {
  constexpr size_t kN = 4096;
  const auto rows = size_t(state.range(0));
  ThreadPool pool(1);
  const std::vector<float> x = numbers(rows * kN), w = numbers(kN * kN);
  std::vector<float> y(rows * kN);
  const LinearRows product{{w.data(), nullptr, kN, kN}, x.data(), kN, y.data(), kN};
  for (auto _ : state) linear_rows({&product, 1}, rows, pool);
  state.SetBytesProcessed(state.iterations() * int64_t(kN * kN * 4));
}
BENCHMARK(gemv)->ArgName("rows")->Arg(1)->Arg(8)->Unit(benchmark::kMicrosecond);

// A vocabulary of 128256. temperature in tenths, 0 is greedy; shape of the distribution: 0 masses
// fall like a power of the rank, 1 nearly flat (the worst case: most of it has to be sorted).
void sample(State& state) {
  std::vector<float> logits = numbers(128256);
  if (state.range(1) == 0)
    for (float& x : logits) x = -3 * std::log(x + 0.502f);
  const SampleOptions options{double(state.range(0)) / 10, 0, state.range(0) > 0 ? 0.9 : 1.0};
  for (auto _ : state) benchmark::DoNotOptimize(sample_token(logits, options, 0.3));
}
BENCHMARK(sample)
    ->ArgNames({"tenths", "shape"})
    ->Args({0, 0})
    ->Args({7, 0})
    ->Args({7, 1})
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace certkv::bench
