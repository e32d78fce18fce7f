// What surrounds dense attention by a library, warp by warp. Included behind cache_body.h by
// cache_kernels.cu and cache_emulated.cc alone. SOURCE: kernels/METHOD.md, "Dense attention by a
// library".
#pragma once

#include "kernels/arith/library_bound.h"
#include "kernels/cuda/cache_body.h"
#include "kernels/cuda/library_args.h"

#define CERTKV_FN CERTKV_LANES_FUNCTION

namespace certkv::CERTKV_LANES_NAMESPACE {

// One warp an item: the largest notes of its sealed blocks, once a step.
CERTKV_FN void largest_notes(const LibraryArgs& args, int index) {
  const PassItem& pass = args.passes[index];
  const I lane = lane_index();
  const int sealed = (pass.page_count - args.appends[index].open / 16 - 1) * kPageTiles;
  F most[2] = {splat(0), splat(0)};
  const float* notes[2] = {pass.k_norm, pass.open_nu};
  for (int first = 0; first < sealed; first += 32) {
    const I at = lane + first;
    const B there = at < sealed;
    for (int part = 0; part < 2; ++part) {
      const F note = load_float(notes[part], select(there, at, splat_i(0)));
      most[part] = select_larger(most[part], select(there, note, splat(0)));
    }
  }
  for (int part = 0; part < 2; ++part) {
    for (int mask = 1; mask < 32; mask *= 2)
      most[part] = select_larger(most[part], shuffle_xor(most[part], mask));
    store_where(lane < 1, args.largest, splat_i(index * 2 + part), most[part]);
  }
}

// One warp a head: the library's output as float, and what is known of it.
CERTKV_FN void judge_library(const LibraryArgs& args, int index, int h) {
  PassItem& pass = args.passes[index];
  const AppendItem& append = args.appends[index];
  const I lane = lane_index();
  const int d = args.head_dim;
  const double inverse = 1.0 / std::sqrt(double(d));
  const size_t row = (size_t(index) * size_t(args.heads) + size_t(h)) * size_t(d);
  const auto* q = reinterpret_cast<const std::byte*>(args.q16 + row);
  const auto* from = reinterpret_cast<const std::byte*>(args.out16 + row);
  D lost = to_double(splat(0)), square = lost;
  for (int first = 0; first < d; first += 64) {
    const I at = lane * 2 + first;
    const U q_pair = load1(q, at * 2), out_pair = load1(from, at * 2);
    for (int i = 0; i < 2; ++i) {
      const F scaled = load_float(pass.scaled + h * d, at + i);
      const D off =
          to_double(scaled) - to_double(unpack_original(args.dtype, q_pair, i == 1)) * inverse;
      const F out = unpack_original(args.dtype, out_pair, i == 1);
      lost = lost + off * off;
      square = square + to_double(out) * to_double(out);
      store(pass.out + h * d, at + i, out);
    }
  }
  LibraryStep x;
  x.dtype = args.dtype;
  x.head_dim = d;
  x.tokens = double(pass.tokens);
  x.query = pass.norm[h];
  x.rounded = std::sqrt(total(lost)) * (1 + 0x1p-40);
  x.out_norm = std::sqrt(total(square)) * (1 + 0x1p-40);
  float most[2] = {args.largest[index * 2], args.largest[index * 2 + 1]};
  for (int block = 0; block <= append.open / 16; ++block) {
    most[0] = larger_or_nan(most[0], append.k_norm[block * kPageTiles]);
    most[1] = larger_or_nan(most[1], append.open_nu[block * kPageTiles]);
  }
  x.k_norm = most[0];
  x.nu = most[1];
  const Certificate judged = library_certificate(x);
  sync_lanes();
  pass.judged[h] = judged;  // all lanes the same
}

}  // namespace certkv::CERTKV_LANES_NAMESPACE

#undef CERTKV_FN
