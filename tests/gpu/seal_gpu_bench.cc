// What sealing costs: one page of every cell of a decode, and all pages of a layer of a prompt, on
// the device and on one thread of the host. seal_gpu_bench [layers] [prompt tokens]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernels/cuda/cache_ops.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/page.h"
#include "kernels/quantize.h"

namespace certkv::cuda {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kHeads = 8, kDim = 128, kRuns = 20;
constexpr auto kDeadline = std::chrono::seconds(60);

double us_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

void measure(Device& device, CacheOps& ops, const char* what, int heads, int pages) {
  const size_t elements = size_t(kPageTokens * kDim), count = size_t(heads) * size_t(pages);
  const size_t page_bytes = page_layout(kDim, PageKind::K8V4).page_bytes();
  std::vector<uint16_t> rows(elements * count);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> some(1 << 20);
  for (uint16_t& x : some) x = float_to_bf16(normal(random));
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = some[(i * 7 + i / some.size()) % some.size()];
  const DeviceArray<uint16_t> k(device, rows.size(), "keys"), v(device, rows.size(), "values");
  device.copy(k.data(), rows.data(), k.bytes());
  device.copy(v.data(), rows.data(), v.bytes());
  const DeviceArray<std::byte> page(device, count * page_bytes, "pages");
  const DeviceArray<uint8_t> status(device, count, "status");
  const DeviceArray<float> notes(device, 2 * count * kPageTiles, "notes");
  SealArgs a;
  a.heads = heads;
  a.pages = pages;
  a.head_dim = kDim;
  a.dtype = DType::BF16;
  a.k = reinterpret_cast<const std::byte*>(k.data());
  a.v = reinterpret_cast<const std::byte*>(v.data());
  a.rows_of_head = size_t(pages) * elements * 2;
  a.rows_of_page = elements * 2;
  a.page = page.data();
  a.page_of_head = size_t(pages) * page_bytes;
  a.page_of_page = page_bytes;
  a.status = status.data();
  a.k_norm = notes.data();
  a.nu = notes.data() + count * kPageTiles;
  a.notes_of_head = size_t(pages) * kPageTiles * sizeof(float);
  a.notes_of_page = kPageTiles * sizeof(float);
  std::vector<double> us;
  for (int run = 0; run < kRuns; ++run) {
    device.synchronize(Deadline::after(kDeadline));
    const auto start = Clock::now();
    ops.seal(a);
    device.synchronize(Deadline::after(kDeadline));
    us.push_back(us_since(start));
  }
  std::sort(us.begin(), us.end());
  std::printf("%s: %zu pages, median of %d runs %.0f us (%.0f to %.0f), %.2f us a page\n", what,
              count, kRuns, us[kRuns / 2], us.front(), us.back(), us[kRuns / 2] / double(count));
}

void measure_host() {
  const PageFormat format = make_page_format(layout_by_name("compact"), kDim, 16);
  std::vector<uint16_t> rows(size_t(kPageTokens * kDim));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (uint16_t& x : rows) x = float_to_bf16(normal(random));
  std::vector<std::byte> memory(format.page_bytes + 64),
      out(page_layout(kDim, PageKind::K8V4).page_bytes());
  auto* page = reinterpret_cast<std::byte*>((uintptr_t(memory.data()) + 63) / 64 * 64);
  constexpr int kPages = 200;
  const auto start = Clock::now();
  for (int i = 0; i < kPages; ++i) {
    (void)seal_page(format, DType::BF16, rows.data(), rows.data(), page);
    convert_page(format, page, out.data());
  }
  std::printf("one thread of the host, seal_page and convert_page: %.1f us a page\n",
              us_since(start) / kPages);
}

}  // namespace
}  // namespace certkv::cuda

int main(int argc, char** argv) {
  using namespace certkv::cuda;
  const int layers = argc > 1 ? std::atoi(argv[1]) : 32;
  const int tokens = argc > 2 ? std::atoi(argv[2]) : 131072;
  if (cuda_device_count() == 0) {
    std::puts("no device answers");
    return 1;
  }
  const auto device = make_cuda_device(0);
  const auto ops = make_cuda_cache_ops(*device);
  std::printf("%s, 8 KV heads, head_dim 128\n", device->name().c_str());
  measure(*device, *ops, "a decode's pages", layers * kHeads, 1);
  measure(*device, *ops, "a layer of a prompt", kHeads, tokens / kPageTokens);
  measure_host();
  return 0;
}
