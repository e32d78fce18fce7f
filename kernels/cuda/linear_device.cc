// Products by cuBLASLt. A row-major matrix is the transpose of a column-major one, so the library
// is asked for y^T [out, rows] = weight^T^T [out, in] x^T [in, rows].
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/dense_kernels.h"
#include "kernels/cuda/int8_kernels.h"
#include "kernels/cuda/linear_ops.h"
#include "kernels/cuda/shared_library.h"

#if defined(CERTKV_HAVE_CUBLASLT)

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <map>
#include <vector>

namespace certkv::cuda {
namespace {

#define CERTKV_CUBLASLT_FUNCTIONS(each)  \
  each(cublasLtCreate);                  \
  each(cublasLtDestroy);                 \
  each(cublasLtGetVersion);              \
  each(cublasLtGetStatusString);         \
  each(cublasLtMatmul);                  \
  each(cublasLtMatmulAlgoGetHeuristic);  \
  each(cublasLtMatmulDescCreate);        \
  each(cublasLtMatmulDescDestroy);       \
  each(cublasLtMatmulDescSetAttribute);  \
  each(cublasLtMatrixLayoutCreate);      \
  each(cublasLtMatrixLayoutDestroy);     \
  each(cublasLtMatmulPreferenceCreate);  \
  each(cublasLtMatmulPreferenceDestroy); \
  each(cublasLtMatmulPreferenceSetAttribute)

struct Api {
  explicit Api(const SharedLibrary& library) {
#define CERTKV_FIND(name) library.find(&this->name, #name)
    CERTKV_CUBLASLT_FUNCTIONS(CERTKV_FIND);
#undef CERTKV_FIND
  }
#define CERTKV_DECLARE(name) decltype(::name)* name = nullptr
  CERTKV_CUBLASLT_FUNCTIONS(CERTKV_DECLARE);
#undef CERTKV_DECLARE

  void check(cublasStatus_t status, const std::string& what) const {
    CERTKV_EXPECT(status == CUBLAS_STATUS_SUCCESS, DeviceError, "{}: cuBLASLt says {} ({})", what,
                  cublasLtGetStatusString(status), int(status));
  }
};

// An object of the library's, destroyed with its owner.
template <typename T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, cublasStatus_t (*)(T)>;

cudaDataType_t cuda_type(DType t) {
  return t == DType::BF16 ? CUDA_R_16BF : t == DType::F16 ? CUDA_R_16F : CUDA_R_32F;
}

// Bytes that an address and a stride are multiples of. 16 is all that kernels load at once.
uint32_t alignment(const void* at, size_t stride_bytes) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(at) | uintptr_t(stride_bytes) | 16u;
  return uint32_t(bits & (~bits + 1));
}

// What an algorithm depends on.
using Key = std::array<size_t, 9>;
Key key_of(const LinearProduct& p) {
  const size_t width = dtype_bytes(p.dtype);
  return {size_t(p.dtype),
          p.out,
          p.in,
          p.rows,
          p.x_stride,
          p.y_stride,
          alignment(p.weight, p.in * width),
          alignment(p.x, p.x_stride * width),
          alignment(p.y, p.y_stride * sizeof(float))};
}

struct Plan {
  Owned<cublasLtMatmulDesc_t> product;
  Owned<cublasLtMatrixLayout_t> weight, x, y;
  cublasLtMatmulAlgo_t algorithm;
};

std::string shape_text(const LinearProduct& p) {
  return fmt::format("the product of {} rows with a weight [{}, {}] of {}", p.rows, p.out, p.in,
                     dtype_name(p.dtype));
}

std::vector<std::string> sonames(const LinearOptions& options) {
  if (!options.library.empty()) return {options.library};
  return {fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR)};
}

class CublasLinear final : public LinearOps {
 public:
  CublasLinear(CudaDevice& device, const LinearOptions& options)
      : device_(device),
        library_("cuBLASLt", "products with weights on a GPU", sonames(options)),
        api_(library_),
        handle_(nullptr, api_.cublasLtDestroy),
        workspace_(device, options.workspace_bytes, "workspace of cuBLASLt"),
        beside_(device, options.workspace_bytes, "workspace of cuBLASLt") {
    cublasLtHandle_t handle = nullptr;
    api_.check(api_.cublasLtCreate(&handle),
               fmt::format("{} on {}", library_.soname(), device.name()));
    handle_.reset(handle);
  }

  std::string name() const override {
    const size_t v = api_.cublasLtGetVersion();  // 130100: 13.1.0
    return fmt::format("cuBLASLt {}.{}.{}", v / 10000, v / 100 % 100, v % 100);
  }

  void prepare(const LinearProduct& p) override {
    check_linear(p);
    (void)plan(p);
  }

  using LinearOps::linear;
  void linear(const LinearProduct& p) override {
    check_linear(p);
    const Plan& made = plan(p);
    const float alpha = 1, beta = p.accumulate ? 1 : 0;
    api_.check(
        api_.cublasLtMatmul(handle_.get(), made.product.get(), &alpha, p.weight, made.weight.get(),
                            p.x, made.x.get(), &beta, p.y, made.y.get(), p.y, made.y.get(),
                            &made.algorithm, (p.beside ? beside_ : workspace_).data(),
                            size_t(workspace_.bytes()), device_.stream()),
        shape_text(p));
  }

  void narrow(DType dtype, const float* from, uint16_t* to, size_t count) override {
    check_narrow(dtype, from, to, count);
    if (count == 0) return;
    check_cuda(launch_narrow(dtype == DType::BF16, from, to, count, device_.stream()),
               "the conversion to 16 bits cannot be launched");
  }

 private:
  void int8_rows(const Int8Product& p) override {
    check_cuda(launch_int8_rows(p, device_.stream()),
               "a product with 8-bit weights cannot be launched");
  }
  void int8_unpack(const Int8Unpack& a) override {
    check_cuda(launch_int8_unpack(a, device_.stream()), "8-bit weights cannot be unpacked");
  }
  void int8_scale(const Int8Scale& a) override {
    check_cuda(launch_int8_scale(a, device_.stream()), "a product cannot be scaled");
  }

  const Plan& plan(const LinearProduct& p) {
    const Key key = key_of(p);
    const auto found = plans_.find(key);
    return found != plans_.end() ? found->second
                                 : plans_.emplace(key, make_plan(p, key)).first->second;
  }

  Plan make_plan(const LinearProduct& p, const Key& key) const {
    const std::string what = shape_text(p);
    cublasLtMatmulDesc_t desc = nullptr;
    // CUBLAS_COMPUTE_32F of F32 matrices stays in FP32: TensorFloat-32 is a type of its own.
    api_.check(api_.cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), what);
    Owned<cublasLtMatmulDesc_t> product(desc, api_.cublasLtMatmulDescDestroy);
    const cublasOperation_t transposed = CUBLAS_OP_T;
    api_.check(api_.cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                                   sizeof transposed),
               what);
    const cudaDataType_t type = cuda_type(p.dtype);
    Plan made{std::move(product),
              layout(type, p.in, p.out, p.in, what),
              layout(type, p.in, p.rows, p.x_stride, what),
              layout(CUDA_R_32F, p.out, p.rows, p.y_stride, what),
              {}};

    cublasLtMatmulPreference_t preference = nullptr;
    api_.check(api_.cublasLtMatmulPreferenceCreate(&preference), what);
    const Owned<cublasLtMatmulPreference_t> owned(preference, api_.cublasLtMatmulPreferenceDestroy);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      api_.check(
          api_.cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
          what);
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(workspace_.bytes()));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(key[6]));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(key[7]));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t(key[8]));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(key[8]));
    cublasLtMatmulHeuristicResult_t best{};
    int count = 0;
    api_.check(api_.cublasLtMatmulAlgoGetHeuristic(handle_.get(), desc, made.weight.get(),
                                                   made.x.get(), made.y.get(), made.y.get(),
                                                   preference, 1, &best, &count),
               what);
    CERTKV_EXPECT(count == 1 && best.state == CUBLAS_STATUS_SUCCESS, DeviceError,
                  "{}: cuBLASLt has no algorithm for it on {}", what, device_.name());
    made.algorithm = best.algo;
    return made;
  }

  Owned<cublasLtMatrixLayout_t> layout(cudaDataType_t type, size_t height, size_t width,
                                       size_t stride, const std::string& what) const {
    cublasLtMatrixLayout_t made = nullptr;
    api_.check(api_.cublasLtMatrixLayoutCreate(&made, type, height, width, int64_t(stride)), what);
    return {made, api_.cublasLtMatrixLayoutDestroy};
  }

  CudaDevice& device_;
  SharedLibrary library_;
  Api api_;
  Owned<cublasLtHandle_t> handle_;
  DeviceArray<std::byte> workspace_, beside_;  // of two products at the same time
  std::map<Key, Plan> plans_;
};

}  // namespace

std::unique_ptr<LinearOps> make_cuda_linear_ops(Device& device, const LinearOptions& options) {
  CERTKV_EXPECT(!device.emulated(), InvalidArgument,
                "products of a GPU were asked for on the emulated device");
  return std::make_unique<CublasLinear>(CudaDevice::of(device), options);
}

}  // namespace certkv::cuda

#else

namespace certkv::cuda {

std::unique_ptr<LinearOps> make_cuda_linear_ops(Device& device, const LinearOptions&) {
  CERTKV_THROW(DeviceError,
               "products on {}: this build has no cuBLASLt, whose header cublasLt.h was not found "
               "when it was configured. Install it (libcublas-dev) and configure again",
               device.name());
}

}  // namespace certkv::cuda

#endif
