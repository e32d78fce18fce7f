#include "tests/kernels/cuda/fake_cudart.h"

#include <cstdlib>
#include <cstring>

#include "kernels/cuda/attend_kernels.h"
#include "kernels/cuda/cache_kernels.h"

namespace certkv::test {

FakeCudart fake_cudart;

namespace {

cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) fake_cudart.last = error;
  return error;
}
// What a test has asked of the next call, else success.
cudaError_t asked(const char* function) {
  const auto it = fake_cudart.fail.find(function);
  if (it == fake_cudart.fail.end()) return cudaSuccess;
  const cudaError_t error = it->second;
  fake_cudart.fail.erase(it);
  return done(error);
}

template <typename Handle>
cudaError_t make(std::set<void*>* held, Handle* handle) {
  *handle = reinterpret_cast<Handle>(std::malloc(1));
  held->insert(*handle);
  return cudaSuccess;
}
cudaError_t destroy(std::set<void*>* held, void* handle) {
  if (held->erase(handle) == 0) return done(cudaErrorInvalidResourceHandle);
  std::free(handle);
  return cudaSuccess;
}
cudaError_t free_from(std::map<void*, uint64_t>* held, void* p) {
  if (p == nullptr) return cudaSuccess;
  if (held->erase(p) == 0) return done(cudaErrorInvalidValue);
  std::free(p);
  return cudaSuccess;
}

}  // namespace
}  // namespace certkv::test

using certkv::test::asked;
using certkv::test::done;
using certkv::test::fake_cudart;

#define CERTKV_FAKE(function) \
  if (const cudaError_t error = asked(#function); error != cudaSuccess) return error

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = fake_cudart.last;
  fake_cudart.last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    default:
      return "an error of the fake runtime";
  }
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = fake_cudart.runtime;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake_cudart.driver;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  CERTKV_FAKE(cudaGetDeviceCount);
  if (fake_cudart.driver == 0) return done(cudaErrorNoDevice);
  if (fake_cudart.driver / 1000 < fake_cudart.runtime / 1000)
    return done(cudaErrorInsufficientDriver);
  *count = fake_cudart.devices;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
  CERTKV_FAKE(cudaSetDevice);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::strcpy(p->name, "Fake GPU");
  p->major = fake_cudart.capability / 10;
  p->minor = fake_cudart.capability % 10;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? 132 : 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = size_t(fake_cudart.total - fake_cudart.taken);
  *total = size_t(fake_cudart.total);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  CERTKV_FAKE(cudaMalloc);
  if (bytes > fake_cudart.total - fake_cudart.taken) return done(cudaErrorMemoryAllocation);
  *p = std::malloc(bytes);
  fake_cudart.memory[*p] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  return certkv::test::free_from(&fake_cudart.memory, p);
}
cudaError_t cudaMallocHost(void** p, size_t bytes) {
  CERTKV_FAKE(cudaMallocHost);
  *p = std::malloc(bytes);
  fake_cudart.host_memory[*p] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  return certkv::test::free_from(&fake_cudart.host_memory, p);
}
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  CERTKV_FAKE(cudaHostRegister);
  uint64_t sum = bytes;
  for (const auto& [at, size] : fake_cudart.registered) sum += size;
  if (bytes == 0) return done(cudaErrorInvalidValue);
  if (sum > fake_cudart.lockable) return done(cudaErrorMemoryAllocation);
  fake_cudart.registered[p] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* p) {
  if (fake_cudart.registered.erase(p) == 0) return done(cudaErrorHostMemoryNotRegistered);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  CERTKV_FAKE(cudaHostGetDevicePointer);
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  CERTKV_FAKE(cudaMemcpyAsync);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  CERTKV_FAKE(cudaMemsetAsync);
  std::memset(to, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  CERTKV_FAKE(cudaStreamCreateWithFlags);
  return certkv::test::make(&fake_cudart.streams, stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return certkv::test::destroy(&fake_cudart.streams, stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  CERTKV_FAKE(cudaStreamWaitEvent);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  CERTKV_FAKE(cudaEventCreateWithFlags);
  return certkv::test::make(&fake_cudart.streams, event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return certkv::test::destroy(&fake_cudart.streams, event);
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  CERTKV_FAKE(cudaEventRecord);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) {
  CERTKV_FAKE(cudaStreamQuery);
  return fake_cudart.never_done ? done(cudaErrorNotReady) : cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  CERTKV_FAKE(cudaStreamBeginCapture);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t, cudaGraph_t, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
  CERTKV_FAKE(cudaStreamBeginCaptureToGraph);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  CERTKV_FAKE(cudaStreamEndCapture);
  return graph == nullptr ? cudaSuccess : certkv::test::make(&fake_cudart.graphs, graph);
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus*, unsigned long long*,
                                     cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
  CERTKV_FAKE(cudaStreamGetCaptureInfo);
  return cudaSuccess;
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*,
                             const cudaGraphEdgeData*, size_t, cudaGraphNodeParams* params) {
  CERTKV_FAKE(cudaGraphAddNode);
  static cudaGraph_t body = nullptr;
  params->conditional.phGraph_out = &body;
  return cudaSuccess;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*,
                                                const cudaGraphEdgeData*, size_t, unsigned) {
  return cudaSuccess;
}
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t, cudaStreamCaptureStatus*, unsigned long long*,
                                        cudaGraph_t*, const cudaGraphNode_t**, size_t*) {
  CERTKV_FAKE(cudaStreamGetCaptureInfo);
  return cudaSuccess;
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*, size_t,
                             cudaGraphNodeParams* params) {
  CERTKV_FAKE(cudaGraphAddNode);
  static cudaGraph_t body = nullptr;
  params->conditional.phGraph_out = &body;
  return cudaSuccess;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, size_t, unsigned) {
  return cudaSuccess;
}
#endif
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle*, cudaGraph_t, unsigned,
                                             unsigned) {
  CERTKV_FAKE(cudaGraphConditionalHandleCreate);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
  CERTKV_FAKE(cudaGraphInstantiate);
  return certkv::test::make(&fake_cudart.graphs, executable);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  CERTKV_FAKE(cudaGraphLaunch);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return certkv::test::destroy(&fake_cudart.graphs, graph);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return certkv::test::destroy(&fake_cudart.graphs, executable);
}

}  // extern "C"

namespace certkv::cuda {

cudaError_t launch_condition(cudaGraphConditionalHandle, const uint32_t*, cudaStream_t) {
  CERTKV_FAKE(launch_condition);
  return cudaSuccess;
}
cudaError_t allow_shared_memory(const KernelShape&, uint32_t) {
  CERTKV_FAKE(allow_shared_memory);
  return cudaSuccess;
}
cudaError_t launch_attend(const PassArgs&, const KernelShape&, uint32_t, cudaStream_t) {
  CERTKV_FAKE(launch_attend);
  return cudaSuccess;
}
cudaError_t launch_merge(const PassArgs&, const KernelShape&, cudaStream_t) {
  CERTKV_FAKE(launch_merge);
  return cudaSuccess;
}

}  // namespace certkv::cuda
