#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/model_kernels.h"
#include "kernels/cuda/model_ops.h"
#include "kernels/cuda/sample_kernels.h"

namespace certkv::cuda {
namespace {

class CudaModelOps final : public ModelOps {
 public:
  explicit CudaModelOps(Device& device) : device_(CudaDevice::of(device)) {}

  void embed(const EmbedRows& a) override {
    check_rows(a);
    if (a.rows != 0) check_cuda(launch_embed(a, stream()), "the embedding cannot be launched");
  }
  void residual_norm(const ResidualNorm& a) override {
    check_rows(a);
    if (a.rows != 0) check_cuda(launch_residual_norm(a, stream()), "a norm cannot be launched");
  }
  void rotate_qkv(const RotateQkv& a) override {
    check_rows(a);
    if (a.rows != 0)
      check_cuda(launch_rotate_qkv(a, stream()), "the rotary embedding cannot be launched");
  }
  void gate(const GatedRows& a) override {
    check_rows(a);
    if (a.rows != 0) check_cuda(launch_gate(a, stream()), "the gate cannot be launched");
  }
  void convert(const Conversion& a) override {
    check_rows(a);
    if (a.count != 0) check_cuda(launch_convert(a, stream()), "a conversion cannot be launched");
  }
  void argmax(const ArgmaxRows& a) override {
    check_rows(a);
    if (a.rows != 0) check_cuda(launch_argmax(a, stream()), "the argmax cannot be launched");
  }
  void sample(const SampleRows& a) override {
    check_rows(a);
    if (a.rows != 0) check_cuda(launch_sample(a, stream()), "the sampler cannot be launched");
  }

 private:
  // Within a conditional part of a graph, or beside other work, it is another one.
  cudaStream_t stream() const { return device_.stream(); }

  CudaDevice& device_;
};

}  // namespace

std::unique_ptr<ModelOps> make_cuda_model_ops(Device& device) {
  CERTKV_EXPECT(!device.emulated(), InvalidArgument, "{} has no stream for CUDA's kernels",
                device.name());
  return std::make_unique<CudaModelOps>(device);
}

}  // namespace certkv::cuda
