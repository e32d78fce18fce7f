// One KV head whose originals were sealed as the product seals them, and the snapshot of blocks
// that a pass runs on, free to be changed by a test.
#pragma once

#include <cmath>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "kvstore/device_tier.h"
#include "runtime/certify/certificate.h"
#include "tests/support/oracle.h"

namespace certkv {

class SealedHead {
 public:
  SealedHead(std::string_view layout, DType dtype, int head_dim, int block_tokens = 16)
      : x{.dtype = dtype, .head_dim = head_dim, .k = {}, .v = {}},
        format(std::make_shared<const PageFormat>(
            make_page_format(layout_by_name(layout), head_dim, block_tokens))),
        tier(format, dtype, std::make_shared<TierAccount>()) {}

  // row(t, c) -> {key, value} of `tokens` more rows, t counted over all.
  template <typename Row>
  void add(size_t tokens, Row row) {
    for (size_t n = 0, t = x.tokens(); n < tokens; ++n, ++t)
      for (size_t c = 0; c < dim(); ++c) {
        const auto [k, v] = row(t, c);
        x.k.push_back(oracle::encode(x.dtype, k));
        x.v.push_back(oracle::encode(x.dtype, v));
      }
  }
  void seal() {
    tier.append(x.k.data(), x.v.data(), x.tokens(), {});
    blocks.assign(tier.blocks().begin(), tier.blocks().end());
  }

  size_t dim() const { return size_t(x.head_dim); }
  AttendContext context() const { return {format.get(), x.dtype}; }
  // The block with original keys or values in place of its codes.
  BlockRef promoted(size_t b, bool key, bool value) const {
    BlockRef ref = blocks[b];
    const size_t first = b * size_t(format->block_tokens) * dim();
    if (key) ref.k = x.k.data() + first;
    if (value) ref.v = x.v.data() + first;
    return ref;
  }
  // Every block from originals alone, as dense attention serves it.
  std::vector<BlockRef> originals() const {
    std::vector<BlockRef> out;
    for (size_t b = 0; b < blocks.size(); ++b) {
      out.push_back(promoted(b, true, true));
      out.back().page = nullptr;
    }
    return out;
  }
  // Served keys and values of the page that holds block b, a sealed and quantised one.
  oracle::Served served(size_t b) const { return oracle::decode_page(*format, blocks[b].page); }
  // Bytes of a page, to be damaged.
  std::byte* page_bytes(size_t b) const { return const_cast<std::byte*>(blocks[b].page); }
  BlockAnnotations& annotations(size_t b) const {
    return reinterpret_cast<BlockAnnotations*>(page_bytes(b) + format->annotations)[blocks[b].index];
  }
  PageNotes& page_notes(size_t b) const {
    return *reinterpret_cast<PageNotes*>(page_bytes(b) + format->notes);
  }

  oracle::Originals x;
  std::shared_ptr<const PageFormat> format;
  DeviceTier tier;
  std::vector<BlockRef> blocks;
};

// A pass over some blocks and the certificates of its outputs.
struct JudgedPass {
  QueryGroup q;
  PassState pass;
  std::vector<std::vector<float>> out;  // [heads][head_dim]
  std::vector<Certificate> certificate;

  JudgedPass(const SealedHead& head, std::span<const BlockRef> blocks, int heads,
             const float* query)
      : q(make_query_group(heads, head.x.head_dim, query)) {
    attend_pass(head.context(), q, blocks, &pass);
    for (int h = 0; h < heads; ++h) {
      out.emplace_back(head.dim());
      certificate.emplace_back();
      judge(h, {});
    }
  }
  void judge(int h, const CorrectionLog& log) {
    finish_output(pass, h, out[size_t(h)].data());
    certificate[size_t(h)] = certify(pass, h, log, out[size_t(h)].data());
  }
};

inline double distance(std::span<const double> exact, std::span<const float> out) {
  double sum = 0;
  for (size_t c = 0; c < exact.size(); ++c)
    sum += (exact[c] - double(out[c])) * (exact[c] - double(out[c]));
  return std::sqrt(sum);
}

}  // namespace certkv
