#include "runtime/bench/memory_bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"
#include "kernels/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace certkv {
namespace {

constexpr size_t kLineWords = 8;

uint64_t* allocate(size_t words) {
  void* p = std::aligned_alloc(64, words * 8);
  if (p == nullptr) throw std::bad_alloc();
  return static_cast<uint64_t*>(p);
}

using Word8 = uint64_t __attribute__((vector_size(64)));

// REQUIRES n a multiple of 4 lines
CERTKV_CPU_VERSIONS
uint64_t sum_words(const uint64_t* p, size_t n) {
  Word8 s0{}, s1{}, s2{}, s3{};
  for (size_t i = 0; i < n; i += 4 * kLineWords) {
    Word8 a, b, c, d;
    std::memcpy(&a, p + i, 64);
    std::memcpy(&b, p + i + 8, 64);
    std::memcpy(&c, p + i + 16, 64);
    std::memcpy(&d, p + i + 24, 64);
    s0 += a;
    s1 += b;
    s2 += c;
    s3 += d;
  }
  s0 = (s0 + s1) + (s2 + s3);
  uint64_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += s0[i];
  return sum;
}

void copy_streaming(uint64_t* to, const uint64_t* from, size_t n) {
#if defined(__SSE2__)
  auto* t = reinterpret_cast<__m128i*>(to);
  const auto* f = reinterpret_cast<const __m128i*>(from);
  for (size_t i = 0; i < n / 2; i += 4) {
    const __m128i a = _mm_load_si128(f + i), b = _mm_load_si128(f + i + 1);
    const __m128i c = _mm_load_si128(f + i + 2), d = _mm_load_si128(f + i + 3);
    _mm_stream_si128(t + i, a);
    _mm_stream_si128(t + i + 1, b);
    _mm_stream_si128(t + i + 2, c);
    _mm_stream_si128(t + i + 3, d);
  }
  _mm_sfence();
#else
  std::memcpy(to, from, n * 8);
#endif
}

}  // namespace

MemoryBandwidth::MemoryBandwidth(size_t buffer_bytes, ThreadPool& pool)
    : pool_(pool),
      words_(std::max<size_t>(buffer_bytes, size_t(1) << 20) / 4096 * 512),
      from_(allocate(words_), std::free),
      to_(allocate(words_), std::free) {
  std::fill_n(from_.get(), words_, 1);
  std::fill_n(to_.get(), words_, 2);
}

template <typename Body>
double MemoryBandwidth::measure(double moved_bytes, const Body& body) {
  const size_t parts = size_t(pool_.threads()), pages = words_ / 512;
  const auto start = std::chrono::steady_clock::now();
  pool_.parallel_for(parts, [&](size_t i) {
    const size_t first = pages * i / parts * 512, last = pages * (i + 1) / parts * 512;
    body(from_.get() + first, to_.get() + first, last - first);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return moved_bytes / seconds.count() * 1e-9;
}

double MemoryBandwidth::copy_gbps() {
  return measure(2.0 * double(buffer_bytes()), [](const uint64_t* from, uint64_t* to, size_t n) {
    std::memcpy(to, from, n * 8);
  });
}

double MemoryBandwidth::copy_streaming_gbps() {
  return measure(2.0 * double(buffer_bytes()),
                 [](const uint64_t* from, uint64_t* to, size_t n) { copy_streaming(to, from, n); });
}

double MemoryBandwidth::read_gbps() {
  std::atomic<uint64_t> total{0};
  const double gbps =
      measure(double(buffer_bytes()),
              [&](const uint64_t* from, uint64_t*, size_t n) { total += sum_words(from, n); });
  sink_ = total;
  CERTKV_EXPECT(sink_ == words_,
                DeviceError,  // every word is 1; also keeps the sum from being left out
                "the sum over a buffer of {} ones came out as {}", words_, sink_);
  return gbps;
}

}  // namespace certkv
