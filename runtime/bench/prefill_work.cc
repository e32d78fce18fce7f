#include "runtime/bench/prefill_work.h"

#include "kernels/prefill_attention.h"
#include "runtime/model_config.h"

namespace certkv {

PrefillWork prefill_work(const ModelConfig& c, int64_t tokens) {
  const auto tile = int64_t(prefill_query_tile(size_t(c.heads_per_group())));
  const auto last = double((tokens - 1) % tile + 1), n = double(tokens), layers = double(c.layers);
  const double q_out = double(c.heads * c.head_dim), kv_out = double(2 * c.kv_heads * c.head_dim);
  const double hidden = double(c.hidden), after = hidden * (q_out + 3 * double(c.intermediate));
  const double pairs = n * (n + 1) / 2, last_pairs = last * (n + (n - last + 1)) / 2;
  PrefillWork work;
  work.products = 2 * (layers * n * hidden * (q_out + kv_out) + ((layers - 1) * n + last) * after +
                       hidden * double(c.vocab));
  work.attention = 4 * q_out * ((layers - 1) * pairs + last_pairs);
  return work;
}

}  // namespace certkv
