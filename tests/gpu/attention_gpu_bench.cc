// Times the certified pass on a GPU: attention_gpu_bench [repeats [tokens batch [layout]]].
//
// 32 query heads over 8 KV heads, head_dim 128, layout compact or the one named, at 8K to 128K
// tokens, batch 1 and 4; pages of random keys and values as the product seals them, copied to
// shuffled places; an open page of 40 tokens; a share of the blocks from originals, drawn at
// random. Variants take turns within one run: the pass with and without its certificate, with 0 and
// 5 % originals, and a kernel that reads the pages' bytes alone. Each measurement is a CUDA graph
// of several passes over copies that together are larger than the L2 cache; the median of the
// repeats is printed, per pass.
#include <cuda_runtime_api.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cuda/attend_device.h"
#include "kernels/quantize.h"
#include "tests/gpu/read_only.h"

namespace certkv {
namespace {

constexpr int kDim = 128, kHeads = 4, kKvHeads = 8, kOpenTokens = 40;
constexpr size_t kColdBytes = size_t(600) << 20;  // of all copies: far above any L2
constexpr int kMadePages = 128, kSlots = 2048;

void check(cudaError_t error) {
  CERTKV_EXPECT(error == cudaSuccess, DeviceError, "{}", cudaGetErrorString(error));
}
template <typename T>
T* device(const std::vector<T>& v) {
  void* p = nullptr;
  check(cudaMalloc(&p, v.size() * sizeof(T)));
  check(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(p);
}
template <typename T>
T* device(size_t count) {
  void* p = nullptr;
  check(cudaMalloc(&p, count * sizeof(T)));
  check(cudaMemset(p, 0, count * sizeof(T)));
  return static_cast<T*>(p);
}

std::mt19937_64& random_bits() {
  static std::mt19937_64 bits(1);
  return bits;
}
float draw() {
  static std::normal_distribution<float> normal;
  return normal(random_bits());
}

// One copy of a batch: all its KV heads.
struct Copy {
  cuda::PassItem* items = nullptr;
  const std::byte* pages = nullptr;
};

struct Setup {
  int tokens, batch, pages, items;
  size_t page_bytes, copy_bytes;
  cuda::PassShape shape;
  cuda::PassArgs args;
  std::vector<Copy> copies;
  std::vector<void*> held;
};

// Of the program's layout.
PageFormat& format() {
  static PageFormat f = make_page_format(layout_by_name("compact"), kDim, 16);
  return f;
}
cuda::PageKind kind() {
  return cuda::page_kind_of(format());
}

// Pages as sealed, in device memory's order.
const std::vector<std::byte>& made_pages() {
  static const std::vector<std::byte> all = [] {
    const PageFormat& f = format();
    const size_t bytes = cuda::page_layout(kDim, kind()).page_bytes();
    std::vector<std::byte> out(kMadePages * bytes), page(f.page_bytes + 64);
    auto* aligned = reinterpret_cast<std::byte*>((uintptr_t(page.data()) + 63) / 64 * 64);
    std::vector<uint16_t> k(64 * kDim), v(k);
    for (int p = 0; p < kMadePages; ++p) {
      for (size_t i = 0; i < k.size(); ++i) {
        k[i] = float_to_bf16(draw() * (i % kDim % 29 == 3 ? 8.0f : 1.0f));
        v[i] = float_to_bf16(draw());
      }
      CERTKV_EXPECT(seal_page(f, DType::BF16, k.data(), v.data(), aligned) == SealStatus::Sealed,
                    InvalidArgument, "a page of random rows cannot be sealed");
      cuda::convert_page(f, aligned, out.data() + size_t(p) * bytes);
    }
    return out;
  }();
  return all;
}

Setup make_setup(int tokens, int batch, double originals, bool certificate) {
  Setup s{};
  s.tokens = tokens;
  s.batch = batch;
  constexpr int kOpen = (kOpenTokens + 15) / 16;
  s.pages = tokens / 64 + kOpen;  // and the open blocks, one by one
  s.items = batch * kKvHeads;
  s.page_bytes = cuda::page_layout(kDim, kind()).page_bytes();
  s.copy_bytes = size_t(tokens / 64) * size_t(s.items) * s.page_bytes;
  const int copies = int(std::max<size_t>(1, (kColdBytes + s.copy_bytes - 1) / s.copy_bytes));
  const cuda::SplitPlan plan =
      cuda::plan_splits(cuda::device_shape(), kDim, 1, kind(), s.pages, s.items);
  s.shape = {.head_dim = kDim,
             .heads = kHeads,
             .items = s.items,
             .splits = plan.splits,
             .warps = plan.warps,
             .kind = kind(),
             .certificate = certificate};
  s.args.pages_per_split = plan.pages_per_split;
  s.args.dtype = DType::BF16;
  const auto hold = [&](auto* p) {
    s.held.push_back(const_cast<std::remove_const_t<std::remove_pointer_t<decltype(p)>>*>(p));
    return p;
  };
  std::vector<uint16_t> rows(size_t(kSlots) * 16 * kDim);
  for (uint16_t& x : rows) x = float_to_bf16(draw());
  const auto* slots = reinterpret_cast<const std::byte*>(hold(device(rows)));
  const std::byte* source = hold(device(made_pages()));
  std::vector<float> scaled(kHeads * kDim), norm;
  for (float& x : scaled) x = draw() / std::sqrt(float(kDim));
  for (int h = 0; h < kHeads; ++h) {
    double n2 = 0;
    for (int c = 0; c < kDim; ++c)
      n2 += double(scaled[size_t(h * kDim + c)]) * scaled[size_t(h * kDim + c)];
    norm.push_back(float(std::sqrt(n2) * (1 + 1e-6)));
  }
  const float* scaled_at = hold(device(scaled));
  const float* norm_at = hold(device(norm));
  const std::vector<float> k_norm(size_t(s.pages) * 4, 20.0f);
  const float* k_norm_at = hold(device(k_norm));
  uint32_t* flags = hold(device<uint32_t>(1));
  const size_t sums = size_t(kHeads * cuda::sums_floats(kDim));
  for (int c = 0; c < copies; ++c) {
    std::byte* pages = hold(device<std::byte>(s.copy_bytes));
    std::vector<cuda::PassItem> items;
    for (int i = 0; i < s.items; ++i) {
      std::vector<cuda::PageEntry> entries(size_t(s.pages));
      std::vector<int32_t> key_slot(entries.size() * 4, -1), value_slot(key_slot);
      for (int p = 0; p < s.pages; ++p) {
        cuda::PageEntry& e = entries[size_t(p)];
        const bool open = p >= tokens / 64;
        if (!open) {
          std::byte* at = pages + (size_t(i) * size_t(tokens / 64) + size_t(p)) * s.page_bytes;
          check(cudaMemcpyAsync(at, source + random_bits()() % kMadePages * s.page_bytes,
                                s.page_bytes, cudaMemcpyDeviceToDevice));
          e.page = at;
        }
        e.tokens = open ? std::min(16, kOpenTokens - 16 * (p - tokens / 64)) : 64;
        for (int t = 0; t < (open ? 1 : 4); ++t) {
          const bool both = open || double(random_bits()() >> 11) * 0x1p-53 < originals;
          if (!both) continue;
          e.wants |= 0x11u << t;
          key_slot[size_t(p * 4 + t)] = int32_t(random_bits()() % kSlots);
          value_slot[size_t(p * 4 + t)] = int32_t(random_bits()() % kSlots);
        }
      }
      cuda::PassItem item;
      item.pages = hold(device(entries));
      item.page_count = s.pages;
      item.heads = kHeads;
      item.scaled = scaled_at;
      item.norm = norm_at;
      item.key_slot = hold(device(key_slot));
      item.value_slot = hold(device(value_slot));
      item.k_norm = k_norm_at;
      item.open_nu = k_norm_at;
      item.unit = 0x1p-4f;
      item.records = hold(device<float>(size_t(s.pages) * cuda::kRecordFloats));
      item.used = hold(device<uint8_t>(size_t(s.pages) * 4));
      item.splits = hold(device<float>(size_t(plan.splits) * sums));
      item.merged = hold(device<double>(sums));
      item.out = hold(device<float>(kHeads * kDim));
      item.flags = flags;
      item.slots = slots;
      item.slot_count = kSlots;
      if (certificate) {  // and judged
        item.relative = 1;
        item.tolerance = 0.05;
        item.tokens = tokens + kOpenTokens;
        item.judged = hold(device<Certificate>(kHeads));
        item.failing = flags;
        item.any_failing = item.climbed = flags;
      }
      items.push_back(item);
    }
    s.copies.push_back({hold(device(items)), pages});
  }
  check(cudaDeviceSynchronize());
  cuda::prepare_attend(s.shape);
  return s;
}

// A graph of one launch after another, as many as `times`, over the copies in turn.
template <typename Launch>
cudaGraphExec_t graph_of(const Setup& s, int times, cudaStream_t stream, Launch launch) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < times; ++i) launch(s.copies[size_t(i) % s.copies.size()]);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphDestroy(graph));
  return exec;
}

struct Variant {
  const char* name;
  cudaGraphExec_t graph = nullptr;
  std::vector<float> us;
  double median() {
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
  }
};

void bench(int tokens, int batch, int repeats, cudaStream_t stream) {
  unsigned* sink = device<unsigned>(512);
  const int read_blocks = cuda::device_shape().multiprocessors * 4;
  std::vector<Variant> variants;
  std::vector<Setup> setups;
  int times = 0;
  const auto add = [&](const char* name, const Setup& s, bool read_only) {
    times = int(std::max<size_t>(s.copies.size(), 8));
    variants.push_back(
        {name,
         graph_of(s, times, stream,
                  [&](const Copy& c) {
                    if (read_only) {
                      check(launch_read_only(c.pages, s.copy_bytes, sink, read_blocks, stream));
                      return;
                    }
                    cuda::PassArgs args = s.args;
                    args.items = c.items;
                    cuda::attend(args, s.shape, stream, cuda::begins_early());
                  }),
         {}});
  };
  setups.push_back(make_setup(tokens, batch, 0, true));
  add("read only", setups[0], true);
  add("certified", setups[0], false);
  Setup without = setups[0];
  without.shape.certificate = false;
  cuda::prepare_attend(without.shape);
  add("no certificate", without, false);
  setups.push_back(make_setup(tokens, batch, 0.05, true));
  add("certified, 5 % originals", setups[1], false);

  cudaEvent_t from, to;
  check(cudaEventCreate(&from));
  check(cudaEventCreate(&to));
  for (int r = -2; r < repeats; ++r)
    for (Variant& v : variants) {
      check(cudaEventRecord(from, stream));
      check(cudaGraphLaunch(v.graph, stream));
      check(cudaEventRecord(to, stream));
      check(cudaEventSynchronize(to));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, from, to));
      if (r >= 0) v.us.push_back(ms * 1000 / float(times));
    }
  for (Variant& v : variants) {
    const double us = v.median();
    fmt::print("{:7} {:5} {:26} {:9.2f} us {:8.0f} GB/s  (fastest {:.2f}, {} splits x {} pages)\n",
               tokens, batch, v.name, us, double(setups[0].copy_bytes) / us * 1e-3, v.us.front(),
               setups[0].shape.splits, setups[0].args.pages_per_split);
    check(cudaGraphExecDestroy(v.graph));
  }
  std::fflush(stdout);
  for (Setup& s : setups)
    for (void* p : s.held) check(cudaFree(p));
  check(cudaFree(sink));
}

}  // namespace
}  // namespace certkv

int main(int argc, char** argv) {
  using namespace certkv;
  try {
    const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
    cudaStream_t stream;
    check(cudaStreamCreate(&stream));
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0));
    fmt::print("{}, {} multiprocessors, medians of {}; GB/s: page bytes over time\n", device.name,
               device.multiProcessorCount, repeats);
    fmt::print("{:>7} {:>5} {:26}\n", "tokens", "batch", "variant");
    if (argc > 4) format() = make_page_format(layout_by_name(argv[4]), kDim, 16);
    if (argc > 3) {
      bench(std::atoi(argv[2]), std::atoi(argv[3]), repeats, stream);
      return 0;
    }
    for (int batch : {1, 4})
      for (int tokens : {8192, 32768, 65536, 131072}) bench(tokens, batch, repeats, stream);
    return 0;
  } catch (const Error& e) {
    fmt::print(stderr, "{}: {}\n", error_kind_name(e.kind()), e.what());
    return 1;
  }
}
