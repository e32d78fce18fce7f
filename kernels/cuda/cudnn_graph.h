// cuDNN's backend API, as little of it as fused attention needs: a graph of operations between
// tensors, and the plan that the library makes of it.
#pragma once

#include <cudnn_backend.h>

#include <deque>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/shared_library.h"

namespace certkv::cuda {

// The functions used, and a handle on one stream.
class Cudnn {
 public:
  // soname: empty for the version this build was made for. Throws DeviceError.
  Cudnn(const std::string& soname, cudaStream_t stream);
  ~Cudnn();
  Cudnn(const Cudnn&) = delete;
  Cudnn& operator=(const Cudnn&) = delete;

  cudnnHandle_t handle() const { return handle_; }
  size_t version_number() const { return get_version_(); }  // 91900
  std::string version() const;                              // "9.19.0"
  // Throws DeviceError: what was being done, the status, and the library's last word.
  void check(cudnnStatus_t status, const std::string& what) const;

  decltype(::cudnnBackendCreateDescriptor)* create_descriptor = nullptr;
  decltype(::cudnnBackendDestroyDescriptor)* destroy_descriptor = nullptr;
  decltype(::cudnnBackendSetAttribute)* set_attribute = nullptr;
  decltype(::cudnnBackendGetAttribute)* get_attribute = nullptr;
  decltype(::cudnnBackendFinalize)* finalize = nullptr;
  decltype(::cudnnBackendExecute)* execute = nullptr;

 private:
  SharedLibrary library_;
  decltype(::cudnnDestroy)* destroy_ = nullptr;
  decltype(::cudnnGetVersion)* get_version_ = nullptr;
  decltype(::cudnnGetErrorString)* error_string_ = nullptr;
  decltype(::cudnnGetLastErrorString)* last_error_string_ = nullptr;
  cudnnHandle_t handle_ = nullptr;
};

// One object of the backend API.
class CudnnDescriptor {
 public:
  CudnnDescriptor(const Cudnn& cudnn, cudnnBackendDescriptorType_t type);
  CudnnDescriptor(CudnnDescriptor&& from) noexcept;
  CudnnDescriptor& operator=(CudnnDescriptor&&) = delete;
  ~CudnnDescriptor();

  cudnnBackendDescriptor_t get() const { return descriptor_; }
  void set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
           const void* values);
  void set(cudnnBackendAttributeName_t name, const CudnnDescriptor& value);
  void set(cudnnBackendAttributeName_t name, int64_t value);
  void set(cudnnBackendAttributeName_t name, bool value);
  void set(cudnnBackendAttributeName_t name, cudnnDataType_t value);
  void finalize();

 private:
  const Cudnn* cudnn_;
  cudnnBackendDescriptor_t descriptor_ = nullptr;
};

// What was made of a graph, ready to run.
class CudnnPlan {
 public:
  CudnnPlan(const Cudnn& cudnn, CudnnDescriptor plan);

  int64_t workspace_bytes() const { return workspace_bytes_; }
  // The memory of a tensor that lies on the device, or, for a scalar, on the host.
  struct Binding {
    int64_t id;
    void* memory;
  };
  // Starts it on the handle's stream.
  void run(std::span<const Binding> bindings, void* workspace) const;

 private:
  const Cudnn* cudnn_;
  CudnnDescriptor plan_;
  int64_t workspace_bytes_ = 0;
};

// How many rows of a (m), columns of b (n) and terms of the sums (k) are real; nullptr: all.
struct CudnnExtents {
  const CudnnDescriptor *m = nullptr, *n = nullptr, *k = nullptr;
};

class CudnnGraph {
 public:
  using Shape = std::vector<int64_t>;
  using Tensor = const CudnnDescriptor*;

  explicit CudnnGraph(const Cudnn& cudnn) : cudnn_(cudnn) {}

  // On the device, under an id that CudnnPlan::Binding names.
  Tensor tensor(int64_t id, cudnnDataType_t type, const Shape& shape, const Shape& strides,
                int64_t align_bytes);
  // A single number in the host's memory, read when the plan runs.
  Tensor scalar(int64_t id, cudnnDataType_t type);
  // Between two operations; never in memory.
  Tensor inner(cudnnDataType_t type, const Shape& shape);

  void matmul(Tensor a, Tensor b, Tensor out, CudnnExtents extents = {});
  // out = mode(x, b, t); b and t may be nullptr. axis: of CUDNN_POINTWISE_GEN_INDEX.
  void pointwise(cudnnPointwiseMode_t mode, cudnnDataType_t compute, Tensor x, Tensor b, Tensor t,
                 Tensor out, int64_t axis = -1);
  void reduce(cudnnReduceTensorOp_t op, Tensor x, Tensor out);

  // The first plan that the library's heuristics advise and its engines accept. Throws DeviceError:
  // `what`, and what the library said.
  CudnnPlan plan(const std::string& what);

 private:
  const Cudnn& cudnn_;
  int64_t next_inner_ = 1000;  // ids of inner tensors, beyond those the caller gives
  std::deque<CudnnDescriptor> tensors_, details_, operations_;
};

}  // namespace certkv::cuda
