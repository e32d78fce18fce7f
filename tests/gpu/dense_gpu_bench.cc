// Times dense attention and products with weights on a GPU: dense_gpu_bench [repeats].
//
// Shapes of Llama-3.1-8B: 32 query heads over 8 KV heads, head_dim 128, products of one layer. Each
// measurement is a CUDA graph of several launches over copies that together are larger than the L2
// cache; the median of the repeats is printed, per launch. GB/s: bytes of keys and values, or of
// the weight, over time. TFLOP/s: multiplications and additions of what the causal mask leaves.
// tests/gpu/dense_attention.py measures PyTorch at the same shapes.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/dense_ops.h"
#include "kernels/cuda/linear_ops.h"

namespace certkv {
namespace {

constexpr size_t kHeads = 32, kKvHeads = 8, kDim = 128;
constexpr size_t kColdBytes = size_t(600) << 20;  // of all copies: far above any L2

using cuda::check_cuda;
using Halves = cuda::DeviceArray<uint16_t>;

class Bench {
 public:
  explicit Bench(int repeats)
      : repeats_(repeats),
        device_(cuda::make_cuda_device(0)),
        dense_(cuda::make_cuda_dense_ops(*device_)),
        linear_(cuda::make_cuda_linear_ops(*device_)) {
    std::mt19937 bits(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<uint16_t> drawn(size_t(1) << 22);
    for (uint16_t& x : drawn) x = float_to_f16(uniform(bits));
    random_ = Halves(*device_, drawn.size(), "random numbers");
    device_->copy(random_.data(), drawn.data(), random_.bytes());
    check_cuda(cudaEventCreate(&from_), "an event");
    check_cuda(cudaEventCreate(&to_), "an event");
    fmt::print("{}, {}, {}, medians of {}\n", device_->name(), dense_->name(), linear_->name(),
               repeats_);
  }

  void decode(size_t tokens, size_t batch) {
    decode("exact shape", tokens, batch, tokens, false);
    decode("lengths on the device", tokens, batch, tokens, true);
    decode("plan for twice the length", tokens, batch, 2 * tokens, true);
  }

  // bucket: rows and tokens are read on the device.
  void prefill(size_t rows, size_t tokens, bool heads_first, bool bucket) {
    const Halves q = halves(rows * kHeads * kDim), out = halves(rows * kHeads * kDim),
                 k = halves(tokens * kKvHeads * kDim), v = halves(tokens * kKvHeads * kDim);
    cuda::DensePrefill a{.dtype = DType::F16, .rows = rows, .tokens = tokens};
    if (bucket) {
      a.row_capacity = rows;
      a.token_capacity = tokens;
    }
    a.heads = kHeads;
    a.kv_heads = kKvHeads;
    a.head_dim = kDim;
    a.q = q.data();
    a.k = k.data();
    a.v = v.data();
    a.out = out.data();
    a.q_row_stride = a.out_row_stride = heads_first ? kDim : kHeads * kDim;
    a.q_head_stride = a.out_head_stride = heads_first ? rows * kDim : kDim;
    a.k_token_stride = a.v_token_stride = heads_first ? kDim : kKvHeads * kDim;
    a.k_head_stride = a.v_head_stride = heads_first ? tokens * kDim : kDim;
    const double made = seconds([&] { dense_->prepare(a); });
    const double us = measure(1, [&](size_t) { dense_->prefill(a); });
    const double pairs = double(rows) * (double(tokens - rows) + (double(rows) + 1) / 2);
    fmt::print(
        "prefill {:7} rows of {:7} {:11} {:8} {:11.1f} us {:7.0f} TFLOP/s  (fastest {:.1f}, plan "
        "{:.0f} ms)\n",
        rows, tokens, heads_first ? "heads first" : "rows first", bucket ? "bucket" : "exact", us,
        4 * pairs * double(kHeads * kDim) / us * 1e-6, fastest_, made * 1e3);
    std::fflush(stdout);
  }

  void product(const char* name, size_t in, size_t out, size_t rows) {
    const size_t bytes = in * out * sizeof(uint16_t);
    const size_t copies = (kColdBytes + bytes - 1) / bytes;
    std::vector<Halves> w;
    for (size_t c = 0; c < copies; ++c) w.push_back(halves(in * out));
    const Halves x = halves(rows * in);
    const cuda::DeviceArray<float> y(*device_, rows * out, "y");
    cuda::LinearProduct p{.weight = w[0].data(),
                          .dtype = DType::F16,
                          .out = out,
                          .in = in,
                          .x = x.data(),
                          .x_stride = in,
                          .y = y.data(),
                          .y_stride = out,
                          .rows = rows};
    linear_->prepare(p);
    const double us = measure(copies, [&](size_t i) {
      p.weight = w[i % copies].data();
      linear_->linear(p);
    });
    fmt::print(
        "linear  {:8} {:5} -> {:5} rows {:5} {:9.2f} us {:7.0f} GB/s {:7.1f} TFLOP/s  (fastest "
        "{:.2f})\n",
        name, in, out, rows, us, double(bytes) / us * 1e-3,
        2 * double(in) * double(out) * double(rows) / us * 1e-6, fastest_);
    std::fflush(stdout);
  }

 private:
  // capacity: of the caches and the plan. told: lengths are read on the device.
  void decode(const char* name, size_t tokens, size_t batch, size_t capacity, bool told) {
    const size_t bytes = 2 * batch * kKvHeads * tokens * kDim * sizeof(uint16_t);
    const size_t copies = std::max<size_t>(1, (kColdBytes + bytes - 1) / bytes);
    std::vector<Halves> k, v;
    for (size_t c = 0; c < copies; ++c) {
      k.push_back(halves(batch * kKvHeads * capacity * kDim));
      v.push_back(halves(batch * kKvHeads * capacity * kDim));
    }
    const Halves q = halves(batch * kHeads * kDim), out = halves(batch * kHeads * kDim);
    const std::vector<int32_t> lengths(batch, int32_t(tokens));
    const cuda::DeviceArray<int32_t> lengths_on(*device_, batch, "lengths");
    device_->copy(lengths_on.data(), lengths.data(), lengths_on.bytes());
    cuda::DenseDecode a{.dtype = DType::F16, .batch = batch, .tokens = capacity};
    a.heads = kHeads;
    a.kv_heads = kKvHeads;
    a.head_dim = kDim;
    a.q = q.data();
    a.out = out.data();
    a.kv_head_stride = capacity * kDim;
    a.kv_batch_stride = kKvHeads * capacity * kDim;
    a.lengths = told ? lengths_on.data() : nullptr;
    a.k = k[0].data();
    a.v = v[0].data();
    const double made = seconds([&] { dense_->prepare(a); });
    const double us = measure(std::max<size_t>(copies, 8), [&](size_t i) {
      a.k = k[i % copies].data();
      a.v = v[i % copies].data();
      dense_->decode(a);
    });
    fmt::print(
        "decode  {:7} tokens batch {} {:26} {:9.2f} us {:7.0f} GB/s  (fastest {:.2f}, plan {:.0f} "
        "ms)\n",
        tokens, batch, name, us, double(bytes) / us * 1e-3, fastest_, made * 1e3);
    std::fflush(stdout);
  }
  Halves halves(size_t count) {
    Halves made(*device_, count, "a bench's array");
    for (size_t at = 0; at < count; at += size_t(random_.count()))
      device_->copy(made.data() + at, random_.data(),
                    std::min(count - at, size_t(random_.count())) * sizeof(uint16_t));
    return made;
  }
  template <typename Body>
  double seconds(Body body) {
    const auto start = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  // Median of one launch of `times` in a graph. UNITS: microseconds.
  double measure(size_t times, const std::function<void(size_t)>& launch) {
    const cudaStream_t stream = device_->stream();
    launch(0);  // kernels load on their first use
    device_->synchronize(Deadline::after(std::chrono::seconds(60)));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "a capture");
    for (size_t i = 0; i < times; ++i) launch(i);
    check_cuda(cudaStreamEndCapture(stream, &graph), "a capture");
    check_cuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
    check_cuda(cudaGraphDestroy(graph), "a graph");
    std::vector<double> us;
    for (int r = -2; r < repeats_; ++r) {
      check_cuda(cudaEventRecord(from_, stream), "an event");
      check_cuda(cudaGraphLaunch(exec, stream), "a graph");
      check_cuda(cudaEventRecord(to_, stream), "an event");
      check_cuda(cudaEventSynchronize(to_), "a graph's work");
      float ms = 0;
      check_cuda(cudaEventElapsedTime(&ms, from_, to_), "an event");
      if (r >= 0) us.push_back(double(ms) * 1000 / double(times));
    }
    check_cuda(cudaGraphExecDestroy(exec), "a graph");
    std::sort(us.begin(), us.end());
    fastest_ = us.front();
    return us[us.size() / 2];
  }

  int repeats_;
  std::unique_ptr<cuda::CudaDevice> device_;
  std::unique_ptr<cuda::DenseOps> dense_;
  std::unique_ptr<cuda::LinearOps> linear_;
  Halves random_;
  cudaEvent_t from_ = nullptr, to_ = nullptr;
  double fastest_ = 0;
};

// What fails is named, and the rest still measured. Returns how much failed.
int run(int repeats) {
  Bench bench(repeats);
  int failed = 0;
  const auto attempt = [&](auto body) {
    try {
      body();
    } catch (const Error& e) {
      fmt::print("{}: {}\n", error_kind_name(e.kind()), e.what());
      ++failed;
    }
  };
  for (size_t batch : {1, 4})
    for (size_t tokens : {8192, 32768, 65536, 131072})
      attempt([&] { bench.decode(tokens, batch); });
  for (bool bucket : {false, true})
    for (bool heads_first : {true, false})
      attempt([&] { bench.prefill(32768, 32768, heads_first, bucket); });
  for (bool bucket : {false, true}) attempt([&] { bench.prefill(4096, 32768, false, bucket); });
  for (size_t rows : {1, 4, 4096})
    attempt([&] {
      bench.product("qkv", 4096, 6144, rows);
      bench.product("o", 4096, 4096, rows);
      bench.product("gate_up", 4096, 28672, rows);
      bench.product("down", 14336, 4096, rows);
    });
  return failed;
}

}  // namespace
}  // namespace certkv

int main(int argc, char** argv) {
  using namespace certkv;
  try {
    return run(argc > 1 ? std::max(1, std::atoi(argv[1])) : 15) == 0 ? 0 : 1;
  } catch (const Error& e) {
    fmt::print(stderr, "{}: {}\n", error_kind_name(e.kind()), e.what());
    return 1;
  }
}
