#include "kernels/cuda/cudnn_graph.h"

#include <utility>

#include "kernels/base/error.h"

namespace certkv::cuda {

// ---- the library --------------------------------------------------------------------------------

Cudnn::Cudnn(const std::string& soname, cudaStream_t stream)
    : library_("cuDNN", "dense attention on a GPU",
               std::vector<std::string>{soname.empty() ? fmt::format("libcudnn.so.{}", CUDNN_MAJOR)
                                                       : soname}) {
  library_.find(&create_descriptor, "cudnnBackendCreateDescriptor");
  library_.find(&destroy_descriptor, "cudnnBackendDestroyDescriptor");
  library_.find(&set_attribute, "cudnnBackendSetAttribute");
  library_.find(&get_attribute, "cudnnBackendGetAttribute");
  library_.find(&finalize, "cudnnBackendFinalize");
  library_.find(&execute, "cudnnBackendExecute");
  library_.find(&destroy_, "cudnnDestroy");
  library_.find(&get_version_, "cudnnGetVersion");
  library_.find(&error_string_, "cudnnGetErrorString");
  library_.find(&last_error_string_, "cudnnGetLastErrorString");
  decltype(::cudnnCreate)* create = nullptr;
  decltype(::cudnnSetStream)* set_stream = nullptr;
  library_.find(&create, "cudnnCreate");
  library_.find(&set_stream, "cudnnSetStream");
  check(create(&handle_), "cuDNN cannot be started");
  const cudnnStatus_t status = set_stream(handle_, stream);
  if (status != CUDNN_STATUS_SUCCESS) {
    (void)destroy_(handle_);
    check(status, "cuDNN cannot use the device's stream");
  }
}

Cudnn::~Cudnn() {
  (void)destroy_(handle_);
}

std::string Cudnn::version() const {
  const size_t v = version_number();
  return fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}

void Cudnn::check(cudnnStatus_t status, const std::string& what) const {
  if (status == CUDNN_STATUS_SUCCESS) return;
  char last[1024] = "";
  last_error_string_(last, sizeof last);
  CERTKV_THROW(DeviceError, "{}: cuDNN {} says {} ({}): {}", what, version(), error_string_(status),
               int(status), last);
}

// ---- descriptors --------------------------------------------------------------------------------

CudnnDescriptor::CudnnDescriptor(const Cudnn& cudnn, cudnnBackendDescriptorType_t type)
    : cudnn_(&cudnn) {
  cudnn.check(cudnn.create_descriptor(type, &descriptor_),
              fmt::format("a descriptor of kind {}", int(type)));
}
CudnnDescriptor::CudnnDescriptor(CudnnDescriptor&& from) noexcept
    : cudnn_(from.cudnn_), descriptor_(std::exchange(from.descriptor_, nullptr)) {}
CudnnDescriptor::~CudnnDescriptor() {
  if (descriptor_ != nullptr) (void)cudnn_->destroy_descriptor(descriptor_);
}

void CudnnDescriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                          int64_t count, const void* values) {
  cudnn_->check(cudnn_->set_attribute(descriptor_, name, type, count, values),
                fmt::format("attribute {}", int(name)));
}
void CudnnDescriptor::set(cudnnBackendAttributeName_t name, const CudnnDescriptor& value) {
  set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value.descriptor_);
}
void CudnnDescriptor::set(cudnnBackendAttributeName_t name, int64_t value) {
  set(name, CUDNN_TYPE_INT64, 1, &value);
}
void CudnnDescriptor::set(cudnnBackendAttributeName_t name, bool value) {
  set(name, CUDNN_TYPE_BOOLEAN, 1, &value);
}
void CudnnDescriptor::set(cudnnBackendAttributeName_t name, cudnnDataType_t value) {
  set(name, CUDNN_TYPE_DATA_TYPE, 1, &value);
}
void CudnnDescriptor::finalize() {
  cudnn_->check(cudnn_->finalize(descriptor_), "a descriptor is refused");
}

// ---- graphs -------------------------------------------------------------------------------------

CudnnGraph::Tensor CudnnGraph::tensor(int64_t id, cudnnDataType_t type, const Shape& shape,
                                      const Shape& strides, int64_t align_bytes) {
  CudnnDescriptor& t = tensors_.emplace_back(cudnn_, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  t.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, id);
  t.set(CUDNN_ATTR_TENSOR_DATA_TYPE, type);
  t.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, align_bytes);
  t.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, int64_t(shape.size()), shape.data());
  t.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, int64_t(strides.size()), strides.data());
  t.finalize();
  return &t;
}

CudnnGraph::Tensor CudnnGraph::scalar(int64_t id, cudnnDataType_t type) {
  const Shape one = {1, 1, 1, 1};
  CudnnDescriptor& t = tensors_.emplace_back(cudnn_, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  t.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, id);
  t.set(CUDNN_ATTR_TENSOR_DATA_TYPE, type);
  t.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, int64_t(4));
  t.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, one.data());
  t.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, one.data());
  t.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, true);
  t.finalize();
  return &t;
}

CudnnGraph::Tensor CudnnGraph::inner(cudnnDataType_t type, const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
  CudnnDescriptor& t = tensors_.emplace_back(cudnn_, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  t.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, next_inner_++);
  t.set(CUDNN_ATTR_TENSOR_DATA_TYPE, type);
  t.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, int64_t(16));
  t.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, int64_t(shape.size()), shape.data());
  t.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, int64_t(strides.size()), strides.data());
  t.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, true);
  t.finalize();
  return &t;
}

void CudnnGraph::matmul(Tensor a, Tensor b, Tensor out, CudnnExtents extents) {
  CudnnDescriptor& detail = details_.emplace_back(cudnn_, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
  detail.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT);
  detail.finalize();
  CudnnDescriptor& op = operations_.emplace_back(cudnn_, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, *a);
  op.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, *b);
  op.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, *out);
  op.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, detail);
  if (extents.m) op.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_M_OVERRIDE_DESC, *extents.m);
  if (extents.n) op.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_N_OVERRIDE_DESC, *extents.n);
  if (extents.k) op.set(CUDNN_ATTR_OPERATION_MATMUL_GEMM_K_OVERRIDE_DESC, *extents.k);
  op.finalize();
}

void CudnnGraph::pointwise(cudnnPointwiseMode_t mode, cudnnDataType_t compute, Tensor x, Tensor b,
                           Tensor t, Tensor out, int64_t axis) {
  CudnnDescriptor& detail = details_.emplace_back(cudnn_, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  detail.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
  detail.set(CUDNN_ATTR_POINTWISE_MATH_PREC, compute);
  if (mode == CUDNN_POINTWISE_GEN_INDEX) detail.set(CUDNN_ATTR_POINTWISE_AXIS, axis);
  detail.finalize();
  CudnnDescriptor& op =
      operations_.emplace_back(cudnn_, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, detail);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, *x);
  if (b) op.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *b);
  if (t) op.set(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, *t);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, *out);
  op.finalize();
}

void CudnnGraph::reduce(cudnnReduceTensorOp_t operation, Tensor x, Tensor out) {
  CudnnDescriptor& detail = details_.emplace_back(cudnn_, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
  detail.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &operation);
  detail.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT);
  detail.finalize();
  CudnnDescriptor& op =
      operations_.emplace_back(cudnn_, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, *x);
  op.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, *out);
  op.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, detail);
  op.finalize();
}

CudnnPlan CudnnGraph::plan(const std::string& what) {
  std::vector<cudnnBackendDescriptor_t> operations;
  operations.reserve(operations_.size());
  for (const CudnnDescriptor& op : operations_) operations.push_back(op.get());
  const cudnnHandle_t handle = cudnn_.handle();
  CudnnDescriptor graph(cudnn_, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  graph.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
  graph.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
            int64_t(operations.size()), operations.data());
  cudnn_.check(cudnn_.finalize(graph.get()), what);

  std::string refusals;
  for (cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK}) {
    CudnnDescriptor advice(cudnn_, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    advice.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
    advice.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    if (cudnn_.finalize(advice.get()) != CUDNN_STATUS_SUCCESS) continue;
    int64_t count = 0;
    if (cudnn_.get_attribute(advice.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                             CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, &count,
                             nullptr) != CUDNN_STATUS_SUCCESS)
      continue;
    std::deque<CudnnDescriptor> configs;
    std::vector<cudnnBackendDescriptor_t> raw;
    for (int64_t i = 0; i < count; ++i)
      raw.push_back(configs.emplace_back(cudnn_, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).get());
    int64_t filled = 0;
    if (count == 0 || cudnn_.get_attribute(advice.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                           CUDNN_TYPE_BACKEND_DESCRIPTOR, count, &filled,
                                           raw.data()) != CUDNN_STATUS_SUCCESS)
      continue;
    for (int64_t i = 0; i < filled; ++i) {
      CudnnDescriptor plan(cudnn_, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
      plan.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
      plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configs[size_t(i)]);
      const cudnnStatus_t status = cudnn_.finalize(plan.get());
      if (status == CUDNN_STATUS_SUCCESS) return {cudnn_, std::move(plan)};
      refusals += fmt::format(" {}", int(status));
    }
  }
  CERTKV_THROW(DeviceError, "{}: cuDNN {} has no engine for it (refused with{})", what,
               cudnn_.version(), refusals.empty() ? " no candidate" : refusals);
}

// ---- plans --------------------------------------------------------------------------------------

CudnnPlan::CudnnPlan(const Cudnn& cudnn, CudnnDescriptor plan)
    : cudnn_(&cudnn), plan_(std::move(plan)) {
  int64_t count = 0;
  cudnn.check(cudnn.get_attribute(plan_.get(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                                  CUDNN_TYPE_INT64, 1, &count, &workspace_bytes_),
              "the workspace of a plan");
}

void CudnnPlan::run(std::span<const Binding> bindings, void* workspace) const {
  std::vector<int64_t> ids;
  std::vector<void*> memory;
  for (const Binding& b : bindings) {
    ids.push_back(b.id);
    memory.push_back(b.memory);
  }
  CudnnDescriptor pack(*cudnn_, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, int64_t(ids.size()), ids.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, int64_t(memory.size()),
           memory.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  pack.finalize();
  cudnn_->check(cudnn_->execute(cudnn_->handle(), plan_.get(), pack.get()),
                "dense attention cannot be launched");
}

}  // namespace certkv::cuda
