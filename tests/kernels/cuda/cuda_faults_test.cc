// What the backend makes of a CUDA runtime that fails: by name, with nothing kept and no error left
// for an innocent call. Over a runtime that fails on request; needs no GPU.
#include <gtest/gtest.h>

#include <chrono>

#include "kernels/cuda/attend_device.h"
#include "kernels/cuda/cuda_device.h"
#include "tests/kernels/cuda/fake_cudart.h"

namespace certkv::test {
namespace {

constexpr uint64_t kGiB = uint64_t(1) << 30;

class CudaFaults : public ::testing::Test {
 protected:
  void SetUp() override { fake_cudart = {}; }
  void TearDown() override {
    EXPECT_TRUE(fake_cudart.nothing_held());
    EXPECT_EQ(fake_cudart.last, cudaSuccess) << "an error was left behind";
  }
  // The error's kind and text, which must have all parts.
  template <typename Body>
  static void expect(ErrorKind kind, const std::vector<std::string>& parts, Body body) {
    try {
      body();
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), kind) << e.what();
      for (const std::string& part : parts)
        EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << part << ": " << e.what();
    }
    EXPECT_EQ(fake_cudart.last, cudaSuccess) << "the runtime's error was not taken";
  }
  static void expect_no_device(const std::vector<std::string>& parts, int ordinal = 0) {
    expect(ErrorKind::DeviceError, parts, [&] { cuda::make_cuda_device(ordinal); });
    EXPECT_TRUE(fake_cudart.nothing_held());
  }
};

TEST_F(CudaFaults, WithoutADriverThatIsSaid) {
  fake_cudart.driver = 0;
  expect_no_device({"no NVIDIA driver answers", "run.backend cpu"});
  EXPECT_EQ(cuda::cuda_device_count(), 0);
}

TEST_F(CudaFaults, ADriverThatIsTooOldIsNamedWithBothVersions) {
  fake_cudart.runtime = 13000;
  fake_cudart.driver = 12040;
  expect_no_device({"supports CUDA 12.4", "needs 13.0", "update the driver"});
  EXPECT_EQ(cuda::cuda_device_count(), 0);
  // An older driver of the same major version is served.
  fake_cudart.runtime = 13020;
  fake_cudart.driver = 13000;
  EXPECT_EQ(cuda::make_cuda_device(0)->name(), "Fake GPU");
}

TEST_F(CudaFaults, ADeviceThatIsNotThereOrTooOldOrTakenIsNamed) {
  expect_no_device({"device 1 was asked for, 1 are visible", "CUDA_VISIBLE_DEVICES"}, 1);
  fake_cudart.capability = 75;
  expect_no_device({"Fake GPU has compute capability 7.5", "8.0"});
  fake_cudart.capability = 90;
  fake_cudart.fail["cudaSetDevice"] = cudaErrorDevicesUnavailable;
  expect_no_device({"device 0 cannot be used"});
  fake_cudart.fail["cudaStreamCreateWithFlags"] = cudaErrorUnknown;
  expect_no_device({"a stream cannot be created"});
  fake_cudart.fail["cudaMallocHost"] = cudaErrorUnknown;
  expect_no_device({"a word of pinned host memory"});
}

TEST_F(CudaFaults, MemoryThatIsRefusedIsNamedWithWhatIsThere) {
  const auto device = cuda::make_cuda_device(0);
  fake_cudart.taken = 63 * kGiB;
  expect(ErrorKind::OutOfMemory,
         {"scratch: ", std::to_string(2 * kGiB), std::to_string(kGiB), std::to_string(64 * kGiB),
          "Fake GPU"},
         [&] { device->allocate(2 * kGiB, "scratch"); });
  fake_cudart.fail["cudaMallocHost"] = cudaErrorMemoryAllocation;
  expect(ErrorKind::OutOfMemory, {"logits: 4096 bytes of pinned host memory", "out of memory"},
         [&] { device->allocate_host(4096, "logits"); });
  device->release(device->allocate(1000, "what fits"));
}

TEST_F(CudaFaults, AnArenaThatCannotBePinnedIsNamedAndNothingStaysPinned) {
  auto* arena = reinterpret_cast<std::byte*>(uintptr_t(1) << 40);  // never read
  const uint64_t bytes = 3 * kGiB + 4096;
  const auto device = cuda::make_cuda_device(0);
  fake_cudart.lockable = 2 * kGiB + 100;
  expect(
      ErrorKind::DeviceError,
      {"cannot be pinned for Fake GPU", "cudaHostRegister refused byte " + std::to_string(2 * kGiB),
       "of " + std::to_string(bytes), "out of memory", "ulimit -l", "store.arena"},
      [&] { device->map_host(arena, bytes); });
  EXPECT_TRUE(fake_cudart.registered.empty());

  fake_cudart.lockable = ~uint64_t(0);
  fake_cudart.fail["cudaHostGetDevicePointer"] = cudaErrorInvalidValue;
  expect(ErrorKind::DeviceError, {"the store's arena has no address on the device"},
         [&] { device->map_host(arena, bytes); });
  EXPECT_TRUE(fake_cudart.registered.empty());

  EXPECT_EQ(device->map_host(arena, bytes), arena);
  uint64_t pinned = 0;  // in pieces, all of it
  for (const auto& [at, size] : fake_cudart.registered) {
    EXPECT_EQ(at, static_cast<void*>(arena + pinned));
    EXPECT_LE(size, kGiB);
    pinned += size;
  }
  EXPECT_EQ(pinned, bytes);
  device->unmap_host(arena);
  EXPECT_TRUE(fake_cudart.registered.empty());
}

TEST_F(CudaFaults, WorkThatFailsOrNeverEndsIsNamed) {
  const auto device = cuda::make_cuda_device(0);
  const auto wait = [&](int ms) {
    device->synchronize(Deadline::after(std::chrono::milliseconds(ms)));
  };
  fake_cudart.fail["cudaStreamQuery"] = cudaErrorIllegalAddress;
  expect(ErrorKind::DeviceError, {"work on the device failed", "an illegal memory access"},
         [&] { wait(1000); });
  fake_cudart.never_done = true;
  const auto start = std::chrono::steady_clock::now();
  expect(ErrorKind::DeadlineExceeded, {"Fake GPU has not finished", "deadline"},
         [&] { wait(120); });
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  fake_cudart.never_done = false;
  wait(1000);
  std::vector<std::byte> bytes(64);
  for (const char* function : {"cudaMemcpyAsync", "cudaMemsetAsync"}) {
    fake_cudart.fail[function] = cudaErrorLaunchFailure;
    expect(ErrorKind::DeviceError, {"cannot be started"}, [&] {
      device->copy(bytes.data() + 32, bytes.data(), 32);
      device->fill(bytes.data(), 1, 64);
    });
  }
}

TEST_F(CudaFaults, AFetchThatFailsOrNeverEndsIsNamed) {
  const auto device = cuda::make_cuda_device(0);
  std::vector<std::byte> bytes(64);
  const cuda::Device::Fetch part = {bytes.data() + 32, bytes.data(), 32};
  for (const char* function : {"cudaEventRecord", "cudaStreamWaitEvent", "cudaMemcpyAsync"}) {
    fake_cudart.fail[function] = cudaErrorLaunchFailure;
    expect(ErrorKind::DeviceError, {"memory cannot be brought to the host beside other work"}, [&] {
      device->fetch({&part, 1});
    });
  }
  (void)device->capture([&] {
    expect(ErrorKind::DeviceError, {"a graph is being captured"}, [&] {
      device->fetch({&part, 1});
    });
  });
  const auto soon = [] { return Deadline::after(std::chrono::milliseconds(120)); };
  fake_cudart.fail["cudaStreamQuery"] = cudaErrorIllegalAddress;
  expect(ErrorKind::DeviceError, {"bringing memory to the host", "an illegal memory access"},
         [&] { device->await_fetches(soon()); });
  fake_cudart.never_done = true;
  expect(ErrorKind::DeadlineExceeded, {"Fake GPU has not finished", "deadline"},
         [&] { device->await_fetches(soon()); });
  // Before memory goes, errors are logged, and the deadline ends the wait.
  const auto start = std::chrono::steady_clock::now();
  device->settle(soon());
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  EXPECT_EQ(fake_cudart.last, cudaSuccess);
  fake_cudart.never_done = false;
  device->fetch({&part, 1});
  device->await_fetches(soon());
}

TEST_F(CudaFaults, AGraphThatCannotBeMadeIsNamedAndLeavesTheDeviceUsable) {
  const auto device = cuda::make_cuda_device(0);
  const uint32_t word = 1;
  int inner = 0;
  const auto capture = [&] {
    return device->capture([&] { device->when(&word, [&] { ++inner; }); });
  };
  for (const auto& [function, says] :
       {std::pair{"cudaStreamBeginCapture", "a graph cannot be captured"},
        std::pair{"cudaStreamGetCaptureInfo", "a conditional part cannot be captured"},
        std::pair{"cudaGraphConditionalHandleCreate", "a conditional part cannot be captured"},
        std::pair{"launch_condition", "a conditional part cannot be captured"},
        std::pair{"cudaGraphAddNode", "a conditional part cannot be captured"},
        std::pair{"cudaStreamBeginCaptureToGraph", "a conditional part cannot be captured"},
        std::pair{"cudaStreamEndCapture", "a conditional part cannot be captured"},
        std::pair{"cudaGraphInstantiate", "a graph cannot be instantiated"}}) {
    fake_cudart.fail[function] = cudaErrorUnknown;
    expect(ErrorKind::DeviceError, {says}, capture);
    EXPECT_TRUE(fake_cudart.fail.empty()) << function << " was not called";
    EXPECT_TRUE(fake_cudart.graphs.empty()) << function;
    device->synchronize(Deadline::after(std::chrono::seconds(1)));  // it captures no longer
  }
  inner = 0;
  const auto graph = capture();
  EXPECT_EQ(inner, 1);
  fake_cudart.fail["cudaGraphLaunch"] = cudaErrorLaunchFailure;
  expect(ErrorKind::DeviceError, {"a graph cannot be launched"}, [&] { device->launch(*graph); });
}

TEST_F(CudaFaults, APassThatCannotBeLaunchedIsNamed) {
  cuda::PassArgs args;
  const cuda::PassShape shape{.head_dim = 128, .heads = 4, .items = 1, .splits = 1, .warps = 5};
  fake_cudart.fail["allow_shared_memory"] = cudaErrorInvalidValue;
  expect(ErrorKind::DeviceError, {"refuses the shared memory that the certified pass needs"},
         [&] { cuda::prepare_attend(shape); });
  fake_cudart.fail["launch_attend"] = cudaErrorInvalidConfiguration;
  expect(ErrorKind::DeviceError, {"the certified pass cannot be launched"},
         [&] { cuda::attend(args, shape, nullptr, true); });
  fake_cudart.fail["launch_merge"] = cudaErrorNoKernelImageForDevice;
  expect(ErrorKind::DeviceError, {"the merge of the certified pass cannot be launched"},
         [&] { cuda::attend(args, shape, nullptr, true); });
  cuda::attend(args, shape, nullptr, true);
}

}  // namespace
}  // namespace certkv::test
