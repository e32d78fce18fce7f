// What attention reads of keys and values, codes by the layout's payload.
// SOURCE: method section 11.
#pragma once

#include "kvstore/device_tier.h"

namespace certkv {

// Of a pass: codes but where originals stand in for them, in so many blocks of keys and of values;
// originals alone of what has no codes. UNITS: bytes
inline double pass_read_bytes(const DeviceTier& tier, size_t keys, size_t values) {
  const PageFormat& f = tier.format();
  const double originals = 2.0 * f.head_dim, block = f.block_tokens;
  const double coded = block * double(tier.quantised_blocks());
  return coded * f.bytes_per_token() + (double(tier.tokens()) - coded) * 2 * originals +
         block * double(keys) * (originals - f.key_code_bytes()) +
         block * double(values) * (originals - f.value_bytes());
}

// Of one block, from the sources named. UNITS: bytes
inline double block_read_bytes(const PageFormat& f, const BlockRef& b) {
  const double originals = 2.0 * f.head_dim;
  const double notes = b.page != nullptr ? f.note_bytes() + f.key_metadata_bytes() : 0;
  return b.tokens * (notes + (b.k != nullptr ? originals : f.key_code_bytes()) +
                     (b.v != nullptr ? originals : f.value_bytes()));
}

}  // namespace certkv
