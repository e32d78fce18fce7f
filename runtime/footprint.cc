#include "runtime/footprint.h"

#include <algorithm>
#include <vector>

#include "kernels/base/error.h"
#include "runtime/certified_engine.h"
#include "runtime/certify/head_class.h"
#include "runtime/engine_setup.h"
#include "runtime/weights.h"

namespace certkv {

namespace {

// Sizes come from configuration files: their product must leave room for small factors.
uint64_t checked_product(std::initializer_list<uint64_t> factors) {
  uint64_t product = 1;
  for (const uint64_t factor : factors) {
    const bool overflow = __builtin_mul_overflow(product, factor, &product);
    CERTKV_EXPECT(!overflow && product >> 56 == 0, InvalidArgument,
                  "the job would need more than 2^56 bytes; lower run.max_batch or model.max_len");
  }
  return product;
}

}  // namespace

Footprint footprint(const ModelConfig& model, const JobOptions& options,
                    const FootprintQuestion& q) {
  CERTKV_EXPECT(q.tensor >= 1 && model.kv_heads % q.tensor == 0, InvalidArgument,
                "parallel.tensor is {}, which does not divide the model's {} KV heads; choose one "
                "of its divisors",
                q.tensor, model.kv_heads);
  CERTKV_EXPECT(q.context >= 2 && q.context <= model.max_tokens, InvalidArgument,
                "the context is {} tokens; this model takes 2 to {}", q.context, model.max_tokens);
  CERTKV_EXPECT(q.batch >= 1 && q.ranks_on_node >= 1, InvalidArgument,
                "batch ({}) and ranks per node ({}) must be at least 1", q.batch, q.ranks_on_node);
  const uint64_t local_heads = uint64_t(model.kv_heads / q.tensor);
  const uint64_t token_bytes = 2 * uint64_t(model.head_dim) * 2;  // K and V, 16 bits
  const int forks = int(std::max<size_t>(options.compare.size(), 1));
  Footprint f;
  f.dense_kv = checked_product(
      {uint64_t(q.batch), uint64_t(model.layers), local_heads, uint64_t(q.context), token_bytes});
  checked_product({f.dense_kv, uint64_t(forks), uint64_t(q.ranks_on_node)});

  RequestShape request;
  request.max_tokens = std::min(options.sampling.max_tokens, q.context - 1);
  request.prompt_tokens = q.context - request.max_tokens;
  request.forks = forks;
  const EngineNeed need = engine_need(options, model, int(q.tensor), request.prompt_tokens,
                                      request.max_tokens, request.forks);
  f.ranks_on_node = q.ranks_on_node;
  f.tier1_token_bytes = largest_page_format(options.cache, int(model.head_dim)).bytes_per_token();
  f.weights = weights_bytes(model, q.tensor, weight_format(options.model.quantization));
  f.tier1 = uint64_t(q.batch) * need.tier1;
  f.scratch = uint64_t(q.batch) * need.scratch;
  f.prefill = need.prefill;
  const std::vector<RequestShape> requests(size_t(q.batch), request);
  f.tier2 = arena_demand(options, model, int(q.tensor), int(q.ranks_on_node), requests);
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
  JobOptions changed = options;
  return largest(question.batch, [&](int64_t batch) {
    question.batch = changed.run.max_batch = batch;
    return footprint(model, changed, question).node() <= node_bytes;
  });
}

int64_t longest_context(const ModelConfig& model, const JobOptions& options,
                        FootprintQuestion question, uint64_t node_bytes) {
  JobOptions changed = options;
  question.batch = changed.run.max_batch = 1;
  constexpr int64_t kStep = 64;
  return kStep * largest(question.context / kStep, [&](int64_t steps) {
           question.context = steps * kStep;
           return footprint(model, changed, question).node() <= node_bytes;
         });
}

}  // namespace certkv
