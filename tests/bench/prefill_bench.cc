// Time of a prefill and of decode's products on one thread: prefill_bench FOLDER TOKENS [THREADS]
// Prints wall and processor seconds; on a busy machine the latter is the one to read.
#include <fmt/core.h>
#include <sys/resource.h>

#include <chrono>
#include <cstdlib>

#include "kernels/base/thread_pool.h"
#include "parallel/local_world.h"
#include "runtime/kv_attention.h"
#include "runtime/model_config.h"
#include "runtime/transformer.h"
#include "runtime/weights.h"

namespace {

using namespace certkv;

// Takes originals and answers zeros: what is measured is the forward pass.
class NoCache : public KvAttention {
 public:
  explicit NoCache(size_t out) : out_(out) {}
  void store_prefill(int64_t, int, size_t, const uint16_t*, const uint16_t*) override {}
  void decode(int, std::span<const DecodeRow> rows, float* flags) override {
    for (size_t r = 0; r < rows.size(); ++r) {
      std::fill(rows[r].out, rows[r].out + out_, 0.0f);
      flags[r] = 0;
    }
  }
  void decode_dense(int, std::span<const DecodeRow>) override {}

 private:
  size_t out_;
};

double processor_seconds() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  return double(use.ru_utime.tv_sec) + double(use.ru_utime.tv_usec) * 1e-6;
}

template <typename Body>
void measure(const char* what, const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  const double used = processor_seconds();
  body();
  fmt::print("{}: {:.3f} s wall, {:.3f} s processor\n", what,
             std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(),
             processor_seconds() - used);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fmt::print(stderr, "usage: prefill_bench FOLDER TOKENS [THREADS]\n");
    return 2;
  }
  const ModelConfig config = load_model_config(argv[1]);
  const Weights weights = load_weights(argv[1], config, 1, 0);
  const std::unique_ptr<Communicator> group = LocalWorld::create(1)->communicator(0);
  ThreadPool pool(argc > 3 ? std::atoi(argv[3]) : 1);
  NoCache cache(size_t(config.heads * config.head_dim));
  Transformer model(config, weights, *group, cache, pool, {false, config.dtype});
  std::vector<int32_t> prompt(size_t(std::atoll(argv[2])));
  for (size_t i = 0; i < prompt.size(); ++i)
    prompt[i] = int32_t(i * i % 251 % size_t(config.vocab));
  measure("prefill", [&] { model.prefill(0, prompt); });
  const ForwardPhases p = model.phases();
  fmt::print("  projections {:.3f} s, attention {:.3f} s\n", p.projections, p.attention);
  for (size_t rows : {1u, 8u}) {
    std::vector<DecodeInput> batch;
    for (size_t r = 0; r < rows; ++r) batch.push_back({int64_t(r), 5, 100});
    measure(rows == 1 ? "100 decode steps of 1 row" : "100 decode steps of 8 rows", [&] {
      for (int step = 0; step < 100; ++step) model.decode(batch);
    });
  }
  return 0;
}
