#include "tests/support/model_runner.h"

#include "kernels/base/thread_pool.h"
#include "kernels/sample.h"
#include "runtime/transformer.h"
#include "runtime/weights.h"
#include "tests/support/plain_kv_attention.h"
#include "tests/support/thread_ranks.h"

namespace certkv::test {

GreedyRun run_model(const std::filesystem::path& folder, int tensor, int threads,
                    bool deterministic, std::span<const int32_t> prompt,
                    std::span<const int32_t> continuation) {
  GreedyRun run;
  const ModelConfig config = load_model_config(folder);
  run_thread_ranks(tensor, [&](Communicator& group) {
    const Weights weights = load_weights(folder, config, tensor, group.rank());
    ThreadPool pool(threads);
    PlainKvAttention cache(size_t(config.kv_heads / tensor), size_t(config.heads_per_group()),
                           size_t(config.head_dim), config.dtype);
    Transformer model(config, weights, group, cache, pool, {deterministic, config.dtype});
    GreedyRun mine;
    mine.first_logits = mine.final_logits = model.prefill(0, prompt);
    for (size_t i = 0; i < continuation.size(); ++i) {
      mine.ids.push_back(sample_greedy(mine.final_logits));
      const DecodeInput row{0, continuation[i], int64_t(prompt.size() + i)};
      mine.final_logits = model.decode({&row, 1}).logits;
    }
    if (group.rank() == 0) run = std::move(mine);
  });
  return run;
}

}  // namespace certkv::test
