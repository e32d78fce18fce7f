#include "runtime/bench/bench_layer.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/digest.h"

namespace certkv {
namespace {

// Bytes of the planes that a pass reads, or does not read, of so many tokens.
double plane_bytes(const TensorPlanes& p, int head_dim, double tokens, bool read) {
  const int read_bits = p.read_residual ? p.code_bits : p.base_bits();
  return tokens * head_dim * (read ? read_bits : p.code_bits - read_bits) / 8;
}

}  // namespace

BenchOriginals::BenchOriginals(std::vector<uint16_t> k, std::vector<uint16_t> v, int block_tokens,
                               int head_dim)
    : k_(std::move(k)),
      v_(std::move(v)),
      block_elements_(size_t(block_tokens) * size_t(head_dim)),
      block_tokens_(block_tokens) {
  for (size_t first = 0; first + block_elements_ <= k_.size(); first += block_elements_) {
    k_digest_.push_back(payload_digest(k_.data() + first, block_elements_ * 2));
    v_digest_.push_back(payload_digest(v_.data() + first, block_elements_ * 2));
  }
}

void BenchOriginals::read(std::span<const uint32_t> blocks,
                          std::span<const Destination> destinations,
                          std::vector<BlockResult>* results) {
  results->assign(blocks.size(), {});
  for (size_t i = 0; i < blocks.size(); ++i) {
    BlockResult& r = (*results)[i];
    const Destination& to = destinations[i];
    if (blocks[i] >= k_digest_.size()) {
      r.status = BlockStatus::Absent;
      continue;
    }
    bool sound = true;
    const auto serve = [&](const std::vector<uint16_t>& from, uint64_t digest, uint16_t* buffer) {
      const uint16_t* at = from.data() + blocks[i] * block_elements_;
      const size_t bytes = block_elements_ * 2;
      if (to.view) {
        sound = sound && (!verify_ || payload_digest(at, bytes) == digest);
        return at;
      }
      if (verify_)
        sound = sound && copy_and_digest(buffer, at, bytes) == digest;
      else
        std::copy_n(at, block_elements_, buffer);
      return static_cast<const uint16_t*>(buffer);
    };
    if (wants_k(to.part)) r.k = serve(k_, k_digest_[blocks[i]], to.k);
    if (wants_v(to.part)) r.v = serve(v_, v_digest_[blocks[i]], to.v);
    r.tokens = uint16_t(block_tokens_);
    r.status = sound ? BlockStatus::Ok : BlockStatus::Corrupt;
  }
}

BenchLayer make_bench_layer(std::shared_ptr<const PageFormat> format, DType dtype,
                            std::span<const SyntheticHead> heads, size_t key_quota,
                            size_t value_quota) {
  BenchLayer layer;
  for (const SyntheticHead& h : heads) {
    BenchOriginals originals(h.k, h.v, format->block_tokens, format->head_dim);
    DeviceTier tier(format, dtype, std::make_shared<TierAccount>());
    tier.append(originals.k(), originals.v(), h.k.size() / size_t(format->head_dim), {});
    HeadState sealed(std::move(tier), key_quota, value_quota);
    HeadState budget = sealed.fork(), paper = sealed.fork(), naive = sealed.fork();
    layer.heads.push_back(std::make_unique<BenchHead>(BenchHead{std::move(originals),
                                                                std::move(sealed),
                                                                std::move(budget),
                                                                std::move(paper),
                                                                std::move(naive),
                                                                {},
                                                                {},
                                                                {}}));
  }
  return layer;
}

double dense_read_bytes(const PageFormat& format, size_t tokens) {
  return 4.0 * double(tokens) * format.head_dim;
}

double certified_read_bytes(const HeadState& state, double f_blocks, double x_blocks) {
  const PageFormat& f = state.tier.format();
  const double sealed = double(state.tier.sealed_blocks()) * f.block_tokens;
  const double open = double(state.tier.tokens()) - sealed;
  const double f_tokens = f_blocks * f.block_tokens, x_tokens = x_blocks * f.block_tokens;
  const Layout& l = f.layout;
  return sealed * f.bytes_per_token() - plane_bytes(l.key, f.head_dim, sealed, false) -
         plane_bytes(l.value, f.head_dim, sealed, false) -
         plane_bytes(l.key, f.head_dim, f_tokens, true) -
         plane_bytes(l.value, f.head_dim, x_tokens, true) + (f_tokens + x_tokens) * 2 * f.head_dim +
         open * 4 * f.head_dim;
}

double value_plane_bytes(const PageFormat& format, double blocks) {
  const double metadata =
      format.value_groups * 2.0 * double(dtype_bytes(format.layout.value.metadata));
  const double tokens = blocks * format.block_tokens;
  return plane_bytes(format.layout.value, format.head_dim, tokens, true) + tokens * metadata;
}

}  // namespace certkv
