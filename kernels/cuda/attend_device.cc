#include "kernels/cuda/attend_device.h"

#include "kernels/base/error.h"
#include "kernels/cuda/attend_kernels.h"

namespace certkv::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) (void)cudaGetLastError();  // or an innocent call would report it again
  CERTKV_EXPECT(error == cudaSuccess, DeviceError, "{}: {}", what, cudaGetErrorString(error));
}
KernelShape kernel_shape(const PassShape& s, bool early = false) {
  return {s.head_dim, s.heads, s.groups(),    s.items, s.splits,
          s.warps,    s.kind,  s.certificate, early};
}
uint32_t shared_bytes(const PassShape& s) {
  return shared_layout(s.head_dim, s.groups(), s.warps, s.kind).bytes;
}

}  // namespace

DeviceShape device_shape() {
  int device = 0, processors = 0, block = 0, processor = 0;
  check(cudaGetDevice(&device), "no CUDA device can be used");
  const auto ask = [&](cudaDeviceAttr what, int* value) {
    check(cudaDeviceGetAttribute(value, what, device),
          "the CUDA device's properties cannot be read");
  };
  ask(cudaDevAttrMultiProcessorCount, &processors);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &block);
  ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &processor);
  return {processors, size_t(block), size_t(processor)};
}

void prepare_attend(const PassShape& shape) {
  check(allow_shared_memory(kernel_shape(shape), shared_bytes(shape)),
        "the device refuses the shared memory that the certified pass needs");
}

bool begins_early() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "no CUDA device can be used");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "the CUDA device's properties cannot be read");
  return major >= 9;
}

void attend(const PassArgs& args, const PassShape& shape, cudaStream_t stream, bool early) {
  check_shape(args, shape);
  check(launch_attend(args, kernel_shape(shape, early), shared_bytes(shape), stream),
        "the certified pass cannot be launched");
  if (!shape.merge) return;
  check(launch_merge(args, kernel_shape(shape, early), stream),
        "the merge of the certified pass cannot be launched");
}

}  // namespace certkv::cuda
