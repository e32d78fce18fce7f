// What a forward pass does on a device beside products and attention. See model_args.h and
// sample_args.h for what each operation is. Every call is enqueued on the device's stream and
// returns at once; nothing is allocated and nothing waited for, so a step can be captured in a
// graph.
//
// ENSURES a row depends on itself alone. The emulation and the GPU give the same bits.
#pragma once

#include <memory>

#include "kernels/cuda/device.h"
#include "kernels/cuda/model_args.h"
#include "kernels/cuda/sample_args.h"

namespace certkv::cuda {

class ModelOps {
 public:
  virtual ~ModelOps() = default;
  ModelOps(const ModelOps&) = delete;
  ModelOps& operator=(const ModelOps&) = delete;

  // All throw DeviceError where a launch is refused, InvalidArgument for a type beyond what
  // model_args.h says.
  virtual void embed(const EmbedRows& rows) = 0;
  virtual void residual_norm(const ResidualNorm& rows) = 0;
  virtual void rotate_qkv(const RotateQkv& rows) = 0;
  virtual void gate(const GatedRows& rows) = 0;
  virtual void convert(const Conversion& elements) = 0;
  virtual void argmax(const ArgmaxRows& rows) = 0;
  virtual void sample(const SampleRows& rows) = 0;

 protected:
  ModelOps() = default;
};

// The device must outlive them.
std::unique_ptr<ModelOps> make_emulated_model_ops(Device& device);
std::unique_ptr<ModelOps> make_cuda_model_ops(Device& device);  // in certkv::kernels_cuda

// Throw InvalidArgument: what every implementation asks of its arguments.
void check_rows(const EmbedRows& rows);
void check_rows(const ResidualNorm& rows);
void check_rows(const RotateQkv& rows);
void check_rows(const GatedRows& rows);
void check_rows(const Conversion& elements);
void check_rows(const ArgmaxRows& rows);
void check_rows(const SampleRows& rows);

}  // namespace certkv::cuda
