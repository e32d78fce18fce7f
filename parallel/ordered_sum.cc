#include "parallel/ordered_sum.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr size_t kChunk = 2048;  // elements whose sums stay in the first-level cache

template <typename T>
void sum_plain(const void* const* parts, size_t part_count, size_t count, void* out) {
  T sum[kChunk];
  for (size_t at = 0; at < count; at += kChunk) {
    const size_t n = std::min(kChunk, count - at);
    std::memcpy(sum, static_cast<const T*>(parts[0]) + at, n * sizeof(T));
    for (size_t p = 1; p < part_count; ++p) {
      const T* part = static_cast<const T*>(parts[p]) + at;
      for (size_t i = 0; i < n; ++i) sum[i] += part[i];
    }
    std::memcpy(static_cast<T*>(out) + at, sum, n * sizeof(T));
  }
}

template <DType kType>
void sum_16(const void* const* parts, size_t part_count, size_t count, void* out) {
  float sum[kChunk];
  for (size_t at = 0; at < count; at += kChunk) {
    const size_t n = std::min(kChunk, count - at);
    for (size_t p = 0; p < part_count; ++p) {
      const uint16_t* part = static_cast<const uint16_t*>(parts[p]) + at;
      if (p == 0) {
        for (size_t i = 0; i < n; ++i) sum[i] = float_from_16(kType, part[i]);
      } else {
        for (size_t i = 0; i < n; ++i) sum[i] += float_from_16(kType, part[i]);
      }
    }
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    for (size_t i = 0; i < n; ++i) to[i] = float_to_16(kType, sum[i]);
  }
}

}  // namespace

bool summable(DType dtype) {
  return dtype == DType::F32 || dtype == DType::F16 || dtype == DType::BF16 || dtype == DType::U64;
}

void ordered_sum(DType dtype, const void* const* parts, size_t part_count, size_t count, void* out) {
  CERTKV_EXPECT(part_count >= 1, InvalidArgument, "a sum needs at least one part");
  switch (dtype) {
    case DType::F32: return sum_plain<float>(parts, part_count, count, out);
    case DType::U64: return sum_plain<uint64_t>(parts, part_count, count, out);
    case DType::F16: return sum_16<DType::F16>(parts, part_count, count, out);
    case DType::BF16: return sum_16<DType::BF16>(parts, part_count, count, out);
    default: break;
  }
  CERTKV_THROW(InvalidArgument, "sums over ranks are made of F32, F16, BF16 and U64, not of {}",
               dtype_name(dtype));
}

}  // namespace certkv
