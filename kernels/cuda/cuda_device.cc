#include "kernels/cuda/cuda_device.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <vector>

#include "kernels/cuda/attend_device.h"

namespace certkv::cuda {

void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report it once more
  if (error == cudaErrorMemoryAllocation)
    CERTKV_THROW(OutOfMemory, "{}: {}", what, cudaGetErrorString(error));
  CERTKV_THROW(DeviceError, "{}: {}", what, cudaGetErrorString(error));
}

namespace {

// What cudaHostRegister pins in one call: a refusal then costs one piece, and is named early.
constexpr uint64_t kRegisterPiece = uint64_t(1) << 30;

std::string version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

class Gpu final : public CudaDevice {
 public:
  explicit Gpu(int ordinal) : ordinal_(ordinal) {
    int driver = 0, runtime = 0, count = 0;
    check_cuda(cudaRuntimeGetVersion(&runtime), "the CUDA runtime's version");
    check_cuda(cudaDriverGetVersion(&driver), "the CUDA driver's version");
    CERTKV_EXPECT(driver != 0, DeviceError,
                  "no NVIDIA driver answers on this machine: install one, or use the CPU backend "
                  "(run.backend cpu)");
    CERTKV_EXPECT(driver / 1000 >= runtime / 1000, DeviceError,
                  "the NVIDIA driver supports CUDA {}, this build needs {}: update the driver, or "
                  "build with an older toolkit",
                  version_text(driver), version_text(runtime));
    check_cuda(cudaGetDeviceCount(&count), "the CUDA devices cannot be counted");
    CERTKV_EXPECT(ordinal >= 0 && ordinal < count, DeviceError,
                  "device {} was asked for, {} are visible (CUDA_VISIBLE_DEVICES)", ordinal, count);
    check_cuda(cudaSetDevice(ordinal), fmt::format("device {} cannot be used", ordinal));
    cudaDeviceProp properties{};
    check_cuda(cudaGetDeviceProperties(&properties, ordinal), "the device's properties");
    name_ = properties.name;
    CERTKV_EXPECT(properties.major >= 8, DeviceError,
                  "{} has compute capability {}.{}: 8.0 or newer is needed", name_,
                  properties.major, properties.minor);
    shape_ = device_shape();
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
               "a stream cannot be created");
  }
  ~Gpu() override {
    for (const auto& [memory, pieces] : mapped_)
      for (void* piece : pieces) (void)cudaHostUnregister(piece);
    (void)cudaStreamDestroy(stream_);
  }

  bool emulated() const override { return false; }
  const DeviceShape& shape() const override { return shape_; }
  std::string name() const override { return name_; }
  uint64_t total_bytes() const override { return memory().second; }
  uint64_t free_bytes() const override { return memory().first; }
  int ordinal() const override { return ordinal_; }
  cudaStream_t stream() const override { return stream_; }

  std::byte* allocate(uint64_t bytes, const char* what) override {
    void* p = nullptr;
    const cudaError_t error = cudaMalloc(&p, size_t(bytes));
    if (error == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      const auto [free, total] = memory();
      CERTKV_THROW(OutOfMemory, "{}: {} bytes of device memory asked for, {} of {} are free on {}",
                   what, bytes, free, total, name_);
    }
    check_cuda(error, fmt::format("{}: {} bytes of device memory", what, bytes));
    return static_cast<std::byte*>(p);
  }
  void release(std::byte* memory) noexcept override { (void)cudaFree(memory); }

  std::byte* allocate_host(uint64_t bytes, const char* what) override {
    void* p = nullptr;
    check_cuda(cudaMallocHost(&p, size_t(bytes)),
               fmt::format("{}: {} bytes of pinned host memory", what, bytes));
    return static_cast<std::byte*>(p);
  }
  void release_host(std::byte* memory) noexcept override { (void)cudaFreeHost(memory); }

  const std::byte* map_host(const std::byte* memory, uint64_t bytes) override {
    // Read-only registration is not to be had everywhere; the kernels only read.
    auto* first = const_cast<std::byte*>(memory);
    std::vector<void*> pieces;
    for (uint64_t at = 0; at < bytes; at += kRegisterPiece) {
      const uint64_t piece = std::min(kRegisterPiece, bytes - at);
      const cudaError_t error = cudaHostRegister(first + at, size_t(piece), cudaHostRegisterMapped);
      if (error != cudaSuccess) {
        for (void* p : pieces) (void)cudaHostUnregister(p);
        (void)cudaGetLastError();
        CERTKV_THROW(DeviceError,
                     "the store's arena cannot be pinned for {}: cudaHostRegister refused byte {} "
                     "of {}: {}. Raise the limit of locked memory (ulimit -l), or make the arena "
                     "smaller (store.arena)",
                     name_, at, bytes, cudaGetErrorString(error));
      }
      pieces.push_back(first + at);
    }
    void* device = nullptr;
    const cudaError_t error = cudaHostGetDevicePointer(&device, first, 0);
    if (error != cudaSuccess) {
      for (void* p : pieces) (void)cudaHostUnregister(p);
      check_cuda(error, "the store's arena has no address on the device");
    }
    mapped_[memory] = std::move(pieces);
    return static_cast<const std::byte*>(device);
  }
  void unmap_host(const std::byte* memory) noexcept override {
    const auto it = mapped_.find(memory);
    if (it == mapped_.end()) return;
    for (void* piece : it->second) (void)cudaHostUnregister(piece);
    mapped_.erase(it);
  }

  void copy(void* to, const void* from, uint64_t bytes) override {
    if (bytes == 0) return;
    check_cuda(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, stream_),
               "a copy cannot be started");
  }
  void fill(void* to, uint8_t byte, uint64_t bytes) override {
    if (bytes == 0) return;
    check_cuda(cudaMemsetAsync(to, byte, size_t(bytes), stream_), "a fill cannot be started");
  }
  void synchronize(Deadline deadline) override {
    // Polled, because cudaStreamSynchronize has no deadline; a while without sleep, because a step
    // is short.
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      const cudaError_t error = cudaStreamQuery(stream_);
      if (error == cudaSuccess) return;
      if (error != cudaErrorNotReady) check_cuda(error, "work on the device failed");
      (void)cudaGetLastError();
      CERTKV_EXPECT(!deadline.passed(), DeadlineExceeded,
                    "{} has not finished its work within the deadline", name_);
      if (std::chrono::steady_clock::now() - start > std::chrono::milliseconds(50))
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  std::pair<uint64_t, uint64_t> memory() const {
    size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), "the device's free memory");
    return {free, total};
  }

  int ordinal_;
  DeviceShape shape_;
  std::string name_;
  cudaStream_t stream_ = nullptr;
  std::map<const std::byte*, std::vector<void*>> mapped_;
};

}  // namespace

std::unique_ptr<CudaDevice> make_cuda_device(int ordinal) {
  return std::make_unique<Gpu>(ordinal);
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

}  // namespace certkv::cuda
