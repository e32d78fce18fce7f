#include "runtime/footprint.h"

#include <algorithm>

#include "kernels/attend.h"
#include "kernels/base/error.h"
#include "kernels/layout.h"
#include "kvstore/block.h"
#include "runtime/transformer.h"
#include "runtime/weights.h"

namespace certkv {

namespace {

// Products of sizes from configuration files: refused where they leave 62 bits.
class Bytes {
 public:
  explicit Bytes(uint64_t value) : value_(value) {}
  Bytes operator*(uint64_t factor) const {
    uint64_t product = 0;
    CERTKV_EXPECT(!__builtin_mul_overflow(value_, factor, &product) && product >> 62 == 0,
                  InvalidArgument,
                  "the job would need more than 2^62 bytes; lower run.max_batch or model.max_len");
    return Bytes(product);
  }
  Bytes operator+(Bytes other) const {
    CERTKV_EXPECT((value_ + other.value_) >> 62 == 0, InvalidArgument,
                  "the job would need more than 2^62 bytes; lower run.max_batch or model.max_len");
    return Bytes(value_ + other.value_);
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_;
};

uint64_t blocks_of(int64_t tokens, int64_t block_tokens) {
  return uint64_t((tokens + block_tokens - 1) / block_tokens);
}

}  // namespace

Footprint footprint(const ModelConfig& model, const JobOptions& options,
                    const FootprintQuestion& q) {
  CERTKV_EXPECT(q.tensor >= 1 && model.kv_heads % q.tensor == 0, InvalidArgument,
                "parallel.tensor is {}, which does not divide the model's {} KV heads; choose one "
                "of its divisors",
                q.tensor, model.kv_heads);
  CERTKV_EXPECT(q.context >= 1 && q.context <= model.max_tokens, InvalidArgument,
                "the context is {} tokens; this model takes 1 to {}", q.context, model.max_tokens);
  CERTKV_EXPECT(q.batch >= 1 && q.ranks_on_node >= 1, InvalidArgument,
                "batch ({}) and ranks per node ({}) must be at least 1", q.batch, q.ranks_on_node);
  const Layout& layout = layout_by_name(options.cache.layout);
  const PageFormat page = make_page_format(layout, int(model.head_dim), options.cache.block_tokens);
  const uint64_t local_heads = uint64_t(model.kv_heads / q.tensor);
  const uint64_t policies = std::max<size_t>(options.compare.size(), 1);
  const uint64_t groups = uint64_t(q.context) / uint64_t(page.group_tokens);
  const uint64_t blocks = blocks_of(q.context, page.block_tokens);
  // One head of one sequence at one layer, times how many of these a rank has.
  const Bytes copies = Bytes(uint64_t(q.batch)) * uint64_t(model.layers) * local_heads;
  const uint64_t token_bytes = 2 * uint64_t(model.head_dim) * 2;  // K and V, 16 bits

  Footprint f;
  f.ranks_on_node = q.ranks_on_node;
  f.tier1_token_bytes = page.bytes_per_token();
  f.weights = weights_bytes(model, q.tensor);
  const Bytes open = Bytes(uint64_t(page.group_tokens)) * token_bytes * policies;
  const Bytes lists = Bytes(blocks) * sizeof(BlockRef) * policies;
  f.tier1 = ((Bytes(groups) * page.page_bytes + open + lists) * copies.value()).value();
  // The quota is per request and KV head (method section 8); no more is used than there are blocks.
  const auto quota = [&](int64_t per_layer) {
    return std::min(blocks, uint64_t(per_layer) / uint64_t(model.kv_heads));
  };
  const uint64_t scratch_blocks =
      quota(options.scratch.key_blocks) + quota(options.scratch.value_blocks);
  f.scratch = (Bytes(scratch_blocks) * (uint64_t(page.block_tokens) * token_bytes / 2) * policies *
               copies.value())
                  .value();
  f.prefill = Transformer::prefill_bytes(model, q.tensor, q.context);
  f.dense_kv = (Bytes(uint64_t(q.context)) * token_bytes * copies.value()).value();

  const BlockShape shape{DType::BF16, uint16_t(page.block_tokens), uint16_t(model.head_dim)};
  // Each sequence's run of slots is rounded up to the arena's granule.
  const Bytes run = Bytes(blocks) * shape.slot_bytes() + Bytes(kArenaGranule - 1);
  f.tier2 = (run * copies.value() * uint64_t(q.ranks_on_node) + Bytes(kArenaDataOffset)).value();
  return f;
}

namespace {

// The largest x in [0, most] with fits(x), given that fits() is true up to some x only.
template <typename Fits>
int64_t largest(int64_t most, Fits fits) {
  int64_t low = 0, high = most;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace

int64_t largest_batch(const ModelConfig& model, const JobOptions& options,
                      FootprintQuestion question, uint64_t node_bytes) {
  return largest(question.batch, [&](int64_t batch) {
    question.batch = batch;
    return footprint(model, options, question).node() <= node_bytes;
  });
}

int64_t longest_context(const ModelConfig& model, const JobOptions& options,
                        FootprintQuestion question, uint64_t node_bytes) {
  question.batch = 1;
  constexpr int64_t kStep = 64;
  return kStep * largest(question.context / kStep, [&](int64_t steps) {
           question.context = steps * kStep;
           return footprint(model, options, question).node() <= node_bytes;
         });
}

}  // namespace certkv
