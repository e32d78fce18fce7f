// Dense attention by cuDNN: the operations of softmax(q k^T / sqrt(d)) v as a graph, which the
// library knows and replaces by one fused kernel.
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/dense_kernels.h"
#include "kernels/cuda/dense_ops.h"

#if defined(CERTKV_HAVE_CUDNN)

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "kernels/cuda/cudnn_graph.h"

namespace certkv::cuda {
namespace {

enum Id : int64_t {
  kQuery = 1,
  kKeys,
  kValues,
  kOut,
  kScale,        // 1 / sqrt(head_dim)
  kPaddingFill,  // minus infinity
  kCausalFill,   // minus infinity
  kRows,         // [batch] on the device
  kTokens,       // [batch] on the device
  kRowsNumber,   // the plan's own, on the host
  kTokensNumber,
};

// What a plan depends on. Strides of an operand: batch, head, token.
struct Shape {
  DType dtype;
  size_t batch, heads, kv_heads, rows, tokens, head_dim;
  std::array<size_t, 3> q, k, v, out;
  bool causal;
  bool lengths;  // the real numbers of rows and tokens are read on the device
  auto operator<=>(const Shape&) const = default;
};

std::string text(const Shape& s) {
  return fmt::format(
      "dense attention of {} sequences, {} rows of {} heads over {} tokens of {} KV "
      "heads, head_dim {}, {}",
      s.batch, s.rows, s.heads, s.tokens, s.kv_heads, s.head_dim, dtype_name(s.dtype));
}

// The library recognises attention by these operations in this order.
CudnnPlan make_plan(const Cudnn& cudnn, const Shape& s) {
  const auto n = [](size_t value) { return int64_t(value); };
  const cudnnDataType_t type = s.dtype == DType::BF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF;
  constexpr cudnnDataType_t kFloat = CUDNN_DATA_FLOAT, kInt = CUDNN_DATA_INT32,
                            kBool = CUDNN_DATA_BOOLEAN;
  constexpr int64_t kAlign = 16;
  CudnnGraph graph(cudnn);
  using Tensor = CudnnGraph::Tensor;
  const CudnnGraph::Shape whole = {n(s.batch), n(s.heads), n(s.rows), n(s.tokens)},
                          row = {n(s.batch), n(s.heads), n(s.rows), 1};
  const auto matrix = [&](int64_t id, size_t heads, size_t length,
                          const std::array<size_t, 3>& strides) {
    return graph.tensor(id, type, {n(s.batch), n(heads), n(length), n(s.head_dim)},
                        {n(strides[0]), n(strides[1]), n(strides[2]), 1}, kAlign);
  };
  const Tensor q = matrix(kQuery, s.heads, s.rows, s.q);
  const Tensor k =
      graph.tensor(kKeys, type, {n(s.batch), n(s.kv_heads), n(s.head_dim), n(s.tokens)},
                   {n(s.k[0]), n(s.k[1]), 1, n(s.k[2])}, kAlign);
  const Tensor v = matrix(kValues, s.kv_heads, s.tokens, s.v);
  const Tensor out = matrix(kOut, s.heads, s.rows, s.out);
  Tensor rows = nullptr, tokens = nullptr;
  if (s.lengths) {
    rows = graph.tensor(kRows, kInt, {n(s.batch), 1, 1, 1}, {1, 1, 1, 1}, sizeof(int32_t));
    tokens = graph.tensor(kTokens, kInt, {n(s.batch), 1, 1, 1}, {1, 1, 1, 1}, sizeof(int32_t));
  }

  Tensor score = graph.inner(kFloat, whole);
  graph.matmul(q, k, score, {.m = rows, .n = tokens});
  const auto then = [&](cudnnPointwiseMode_t mode, Tensor b, Tensor t) {
    const Tensor next = graph.inner(kFloat, whole);
    graph.pointwise(mode, kFloat, score, b, t, next);
    score = next;
  };
  const auto index = [&](int64_t axis, cudnnDataType_t compute) {
    const Tensor made = graph.inner(kInt, whole);
    graph.pointwise(CUDNN_POINTWISE_GEN_INDEX, compute, score, nullptr, nullptr, made, axis);
    return made;
  };
  const auto combine = [&](cudnnPointwiseMode_t mode, cudnnDataType_t t, Tensor a, Tensor b) {
    const Tensor made = graph.inner(t, whole);
    graph.pointwise(mode, t, a, b, nullptr, made);
    return made;
  };
  then(CUDNN_POINTWISE_MUL, graph.scalar(kScale, kFloat), nullptr);
  if (s.lengths) {
    const Tensor r = index(2, kInt), c = index(3, kInt);
    const Tensor real_row = combine(CUDNN_POINTWISE_CMP_LT, kBool, r, rows);
    const Tensor real_token = combine(CUDNN_POINTWISE_CMP_LT, kBool, c, tokens);
    const Tensor real = combine(CUDNN_POINTWISE_LOGICAL_AND, kBool, real_row, real_token);
    then(CUDNN_POINTWISE_BINARY_SELECT, graph.scalar(kPaddingFill, kFloat), real);
  }
  if (s.causal) {
    Tensor r = index(2, kFloat);
    const Tensor c = index(3, kFloat);
    if (s.lengths || s.rows != s.tokens) {  // the rows are the last of the tokens
      r = combine(CUDNN_POINTWISE_ADD, kInt, r,
                  s.lengths ? tokens : graph.scalar(kTokensNumber, kInt));
      r = combine(CUDNN_POINTWISE_SUB, kInt, r, s.lengths ? rows : graph.scalar(kRowsNumber, kInt));
    }
    const Tensor seen = combine(CUDNN_POINTWISE_CMP_GE, kBool, r, c);
    then(CUDNN_POINTWISE_BINARY_SELECT, graph.scalar(kCausalFill, kFloat), seen);
  }
  const Tensor largest = graph.inner(kFloat, row), sum = graph.inner(kFloat, row);
  graph.reduce(CUDNN_REDUCE_TENSOR_MAX, score, largest);
  then(CUDNN_POINTWISE_SUB, largest, nullptr);
  then(CUDNN_POINTWISE_EXP, nullptr, nullptr);
  graph.reduce(CUDNN_REDUCE_TENSOR_ADD, score, sum);
  // What training would keep of the softmax. Nobody reads it here, but attention without it is not
  // recognised.
  const Tensor log_sum = graph.inner(kFloat, row), statistic = graph.inner(kFloat, row);
  graph.pointwise(CUDNN_POINTWISE_LOG, kFloat, sum, nullptr, nullptr, log_sum);
  graph.pointwise(CUDNN_POINTWISE_ADD, kFloat, largest, log_sum, nullptr, statistic);
  const Tensor weight = graph.inner(type, whole);
  graph.pointwise(CUDNN_POINTWISE_DIV, kFloat, score, sum, nullptr, weight);
  graph.matmul(weight, v, out, {.m = rows, .k = tokens});
  return graph.plan(text(s));
}

class CudnnDense final : public DenseOps {
 public:
  CudnnDense(CudaDevice& device, const DenseOptions& options)
      : device_(device),
        cudnn_(options.library, device.stream()),
        counts_(device, 2, "row and token counts") {}

  std::string name() const override { return "cuDNN " + cudnn_.version(); }

  void prepare(const DensePrefill& a) override {
    check_dense(a);
    (void)plan(shape_of(a));
  }
  void prepare(const DenseDecode& a) override {
    check_dense(a);
    (void)plan(shape_of(a));
  }

  void prefill(const DensePrefill& a) override {
    check_dense(a);
    const Shape shape = shape_of(a);
    const CudnnPlan& made = plan(shape);
    int32_t *rows = counts_.data(), *tokens = counts_.data() + 1;
    if (shape.lengths)
      check_cuda(launch_set_pair(rows, int32_t(a.rows), int32_t(a.tokens), device_.stream()),
                 "the counts of dense attention cannot be set");
    run(shape, made, a.q, a.k, a.v, a.out, rows, tokens);
  }

  void decode(const DenseDecode& a) override {
    check_dense(a);
    const Shape shape = shape_of(a);
    const CudnnPlan& made = plan(shape);
    run(shape, made, a.q, a.k, a.v, a.out, ones_.data(), a.lengths);
  }

 private:
  static Shape shape_of(const DensePrefill& a) {
    const size_t rows = std::max(a.rows, a.row_capacity),
                 tokens = std::max(a.tokens, a.token_capacity);
    // With one sequence the batch's stride is never used; it is what dense arrays would have.
    return {.dtype = a.dtype,
            .batch = 1,
            .heads = a.heads,
            .kv_heads = a.kv_heads,
            .rows = rows,
            .tokens = tokens,
            .head_dim = a.head_dim,
            .q = {rows * a.heads * a.head_dim, a.q_head_stride, a.q_row_stride},
            .k = {tokens * a.kv_heads * a.head_dim, a.k_head_stride, a.k_token_stride},
            .v = {tokens * a.kv_heads * a.head_dim, a.v_head_stride, a.v_token_stride},
            .out = {rows * a.heads * a.head_dim, a.out_head_stride, a.out_row_stride},
            .causal = true,
            .lengths = rows != a.rows || tokens != a.tokens || a.row_capacity != 0 ||
                       a.token_capacity != 0};
  }
  static Shape shape_of(const DenseDecode& a) {
    const std::array<size_t, 3> query = {a.heads * a.head_dim, a.head_dim, a.heads * a.head_dim},
                                cache = {a.kv_batch_stride, a.kv_head_stride, a.head_dim};
    return {.dtype = a.dtype,
            .batch = a.batch,
            .heads = a.heads,
            .kv_heads = a.kv_heads,
            .rows = 1,
            .tokens = a.tokens,
            .head_dim = a.head_dim,
            .q = query,
            .k = cache,
            .v = cache,
            .out = query,
            .causal = false,  // the one row sees all
            .lengths = a.lengths != nullptr};
  }

  const CudnnPlan& plan(const Shape& shape) {
    const auto found = plans_.find(shape);
    if (found != plans_.end()) return found->second;
    CudnnPlan made = make_plan(cudnn_, shape);
    const uint64_t bytes = uint64_t(made.workspace_bytes());
    // Graphs that were captured go on using what they were captured with, so nothing is freed.
    if (bytes > 0 && (workspaces_.empty() || workspaces_.back().bytes() < bytes))
      workspaces_.emplace_back(device_, bytes, "workspace of cuDNN");
    if (shape.lengths && !shape.causal && ones_.count() < shape.batch) {
      const std::vector<int32_t> ones(shape.batch, 1);
      held_ones_.push_back(std::move(ones_));
      ones_ = DeviceArray<int32_t>(device_, shape.batch, "row counts of a decode step");
      device_.copy(ones_.data(), ones.data(), ones_.bytes());
    }
    return plans_.emplace(shape, std::move(made)).first->second;
  }

  void run(const Shape& shape, const CudnnPlan& made, const void* q, const void* k, const void* v,
           void* out, const int32_t* rows, const int32_t* tokens) {
    float scale = float(1 / std::sqrt(double(shape.head_dim)));
    // Before 9.10 the library wants the lowest number where nothing is seen.
    float hidden = cudnn_.version_number() < 91000 ? std::numeric_limits<float>::lowest()
                                                   : -std::numeric_limits<float>::infinity();
    int32_t all_rows = int32_t(shape.rows), all_tokens = int32_t(shape.tokens);
    const auto at = [](const void* p) { return const_cast<void*>(p); };
    std::array<CudnnPlan::Binding, 11> bindings;
    size_t count = 0;
    const auto bind = [&](Id id, void* memory) { bindings[count++] = {id, memory}; };
    bind(kQuery, at(q));
    bind(kKeys, at(k));
    bind(kValues, at(v));
    bind(kOut, out);
    bind(kScale, &scale);
    if (shape.lengths) {
      bind(kPaddingFill, &hidden);
      bind(kRows, at(rows));
      bind(kTokens, at(tokens));
    }
    if (shape.causal) {
      bind(kCausalFill, &hidden);
      if (!shape.lengths && shape.rows != shape.tokens) {
        bind(kRowsNumber, &all_rows);
        bind(kTokensNumber, &all_tokens);
      }
    }
    made.run({bindings.data(), count}, workspaces_.empty() ? nullptr : workspaces_.back().data());
  }

  CudaDevice& device_;
  Cudnn cudnn_;
  DeviceArray<int32_t> counts_;  // of the prefill that is under way: rows, tokens
  DeviceArray<int32_t> ones_;    // rows of each sequence of a decode step
  std::vector<DeviceArray<int32_t>> held_ones_;
  std::vector<DeviceArray<std::byte>> workspaces_;
  std::map<Shape, CudnnPlan> plans_;
};

}  // namespace

std::unique_ptr<DenseOps> make_cuda_dense_ops(Device& device, const DenseOptions& options) {
  CERTKV_EXPECT(!device.emulated(), InvalidArgument,
                "dense attention of a GPU was asked for on the emulated device");
  return std::make_unique<CudnnDense>(CudaDevice::of(device), options);
}

}  // namespace certkv::cuda

#else

namespace certkv::cuda {

std::unique_ptr<DenseOps> make_cuda_dense_ops(Device& device, const DenseOptions&) {
  CERTKV_THROW(DeviceError,
               "dense attention on {}: this build has no cuDNN, whose header cudnn_backend.h was "
               "not found when it was configured. Install it (libcudnn9-dev) and configure again",
               device.name());
}

}  // namespace certkv::cuda

#endif
