// Sums of several ranks' parts in rank order: the arithmetic of all_reduce_sum where the order is
// promised, and of the deterministic mode on gathered parts.
#pragma once

#include <cstddef>

#include "kernels/base/dtype.h"

namespace certkv {

// out[i] := parts[0][i] + parts[1][i] + ... from left to right. F32 in FP32; F16 and BF16 in FP32,
// rounded once at the end; U64 modulo 2^64. `out` may be one of the parts.
// REQUIRES parts >= 1 and one of these types (InvalidArgument)
void ordered_sum(DType dtype, const void* const* parts, size_t part_count, size_t count, void* out);

bool summable(DType dtype);

}  // namespace certkv
