#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/cuda/model_body.h"
#include "kernels/cuda/model_ops.h"
#include "kernels/cuda/sample_body.h"

namespace certkv::cuda {
namespace {

bool is_float(DType t) {
  return t == DType::F32 || t == DType::F16 || t == DType::BF16;
}
void expect_float(DType t, const char* what) {
  CERTKV_EXPECT(is_float(t), InvalidArgument, "{} of type {}: F32, F16 or BF16 is needed", what,
                dtype_name(t));
}

class EmulatedModelOps final : public ModelOps {
 public:
  void embed(const EmbedRows& a) override {
    check_rows(a);
    for (size_t r = 0; r < a.rows; ++r)
      for (size_t i = 0; i < a.n; ++i) embed_element(a, r, i);
  }

  void residual_norm(const ResidualNorm& a) override {
    check_rows(a);
    for (size_t r = 0; r < a.rows; ++r) {
      const ResidualNormRow row{a, r, poisoned(kRowThreads)};
      for (int t = 0; t < kRowThreads; ++t) row.add(t);
      if (a.weight == nullptr) continue;
      for (int t = 0; t < kSumParts; ++t) row.sum.join(t);
      for (int t = 0; t < kRowThreads; ++t) row.scale(t);
    }
  }

  void rotate_qkv(const RotateQkv& a) override {
    check_rows(a);
    for (size_t r = 0; r < a.rows; ++r)
      for (size_t h = 0; h < a.heads + 2 * a.kv_heads; ++h) {
        const RotateHead head{a, r, h, poisoned(kHeadThreads)};
        if (head.norm() != nullptr) {
          for (int t = 0; t < kHeadThreads; ++t) head.square(t);
          for (int t = 0; t < kSumParts; ++t) head.sum.join(t);
        }
        for (int t = 0; t < kHeadThreads; ++t) head.turn(t);
      }
  }

  void gate(const GatedRows& a) override {
    check_rows(a);
    for (size_t r = 0; r < a.rows; ++r)
      for (size_t i = 0; i < a.n; ++i) gate_element(a, r, i);
  }

  void convert(const Conversion& a) override {
    check_rows(a);
    for (uint64_t i = 0; i < a.count; ++i) convert_element(a, i);
  }

  void argmax(const ArgmaxRows& a) override {
    check_rows(a);
    std::vector<uint64_t> shared(kRowThreads + kSumParts);
    for (size_t r = 0; r < a.rows; ++r) {
      a.best[r] = 0;
      for (size_t part = 0; part * kArgmaxPart < a.n; ++part) {
        const ArgmaxPart row{a, r, part, shared.data(), kRowThreads};
        for (int t = 0; t < kRowThreads; ++t) row.best(t);
        for (int t = 0; t < kSumParts; ++t) row.join(t);
        row.finish();
      }
    }
  }

  void sample(const SampleRows& a) override {
    check_rows(a);
    std::memset(a.scratch, 0, a.rows * sizeof(SampleScratch));
    const auto shared = std::make_unique<SampleShared>();
    const auto blocks = [&](size_t parts, auto program) {
      for (size_t r = 0; r < a.rows; ++r)
        for (size_t part = 0; part < parts; ++part) {
          std::memset(static_cast<void*>(shared.get()), 0xa5, sizeof(SampleShared));
          SampleBlock block(a, r, part, *shared);
          program(block);
        }
    };
    const BlockThreads threads;
    for (int stage = 0; stage < kSampleStages; ++stage)
      blocks(a.parts(), [&](SampleBlock& block) { block.search(threads, stage); });
    blocks(a.parts(), [&](SampleBlock& block) { block.add_part(threads); });
    blocks(1, [&](SampleBlock& block) { block.draw_token(threads); });
  }

 private:
  // A block's shared memory: what it reads it must have written.
  BlockSum poisoned(int threads) {
    shared_.assign(size_t(threads + kSumParts), std::numeric_limits<float>::quiet_NaN());
    return {shared_.data(), threads};
  }
  std::vector<float> shared_;
};

}  // namespace

void check_rows(const EmbedRows& a) {
  expect_float(a.dtype, "an embedding");
}
void check_rows(const ResidualNorm& a) {
  expect_float(a.dtype, "normed rows");
  CERTKV_EXPECT(a.y == nullptr || a.fault != nullptr, InvalidArgument,
                "rows are added without a place for their faults");
  CERTKV_EXPECT(
      (a.again == nullptr) == (a.y_again == nullptr) && (a.again == nullptr || a.y != nullptr),
      InvalidArgument, "rows in place of y: y, they and the word that decides are needed");
}
void check_rows(const RotateQkv& a) {
  CERTKV_EXPECT(a.originals == DType::F16 || a.originals == DType::BF16, InvalidArgument,
                "originals of type {}: BF16 or F16 is needed", dtype_name(a.originals));
  CERTKV_EXPECT(a.head_dim % 2 == 0 && a.head_dim > 0, InvalidArgument,
                "head_dim is {}: an even number is needed", a.head_dim);
  CERTKV_EXPECT(a.fault != nullptr, InvalidArgument,
                "keys and values are rounded without a place for their faults");
}
void check_rows(const GatedRows& a) {
  expect_float(a.dtype, "gated rows");
}
void check_rows(const Conversion& a) {
  expect_float(a.from_dtype, "what is converted");
  expect_float(a.to_dtype, "the result of a conversion");
}
void check_rows(const ArgmaxRows& a) {
  CERTKV_EXPECT(a.n > 0 && a.n <= size_t(std::numeric_limits<int32_t>::max()), InvalidArgument,
                "argmax of rows of {} elements: 1 to 2^31 - 1 are possible", a.n);
  CERTKV_EXPECT(a.rows <= 65535, InvalidArgument, "argmax of {} rows: up to 65535 are possible",
                a.rows);
}
void check_rows(const SampleRows& a) {
  CERTKV_EXPECT(a.rows <= 65535, InvalidArgument, "sampling of {} rows: up to 65535 are possible",
                a.rows);
  CERTKV_EXPECT(a.n > 0 && a.pieces > 0 && a.parts() <= kSampleParts, InvalidArgument,
                "sampling among {} tokens in {} pieces of up to {}: {} tokens are possible", a.n,
                a.pieces, a.stride, kSampleParts * kSamplePart);
}

std::unique_ptr<ModelOps> make_emulated_model_ops(Device& device) {
  CERTKV_EXPECT(device.emulated(), InvalidArgument,
                "{} is no emulated device: its memory cannot be read here", device.name());
  return std::make_unique<EmulatedModelOps>();
}

}  // namespace certkv::cuda
