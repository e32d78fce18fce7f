#include "kernels/cuda/cuda_device.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/attend_device.h"
#include "kernels/cuda/cache_kernels.h"

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
    current_ = stream_;
    try {
      check_cuda(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking),
                 "a stream cannot be created");
      check_cuda(cudaStreamCreateWithFlags(&fetching_, cudaStreamNonBlocking),
                 "a stream cannot be created");
      for (cudaEvent_t* event : {&forked_, &fetch_after_})
        check_cuda(cudaEventCreateWithFlags(event, cudaEventDisableTiming),
                   "an event cannot be created");
      for (cudaEvent_t& event : done_)
        check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
                   "an event cannot be created");
      check_cuda(cudaMallocHost(reinterpret_cast<void**>(&word_), sizeof *word_),
                 "a word of pinned host memory");
    } catch (...) {
      free_streams();
      throw;
    }
  }
  ~Gpu() override {
    for (const auto& [memory, pieces] : mapped_)
      for (void* piece : pieces) (void)cudaHostUnregister(piece);
    for (cudaStream_t s : inner_) (void)cudaStreamDestroy(s);
    (void)cudaFreeHost(word_);
    free_streams();
  }

  bool emulated() const override { return false; }
  const DeviceShape& shape() const override { return shape_; }
  std::string name() const override { return name_; }
  uint64_t total_bytes() const override { return memory().second; }
  uint64_t free_bytes() const override { return memory().first; }
  int ordinal() const override { return ordinal_; }
  cudaStream_t stream() const override { return current_; }

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
    check_cuda(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, current_),
               "a copy cannot be started");
  }
  void fill(void* to, uint8_t byte, uint64_t bytes) override {
    if (bytes == 0) return;
    check_cuda(cudaMemsetAsync(to, byte, size_t(bytes), current_), "a fill cannot be started");
  }
  void synchronize(Deadline deadline) override {
    CERTKV_EXPECT(!capturing_, DeviceError, "a graph is being captured: nothing can be waited for");
    poll(stream_, "work on the device failed", deadline);
  }
  void fetch(std::span<const Fetch> parts) override {
    const char* what = "memory cannot be brought to the host beside other work";
    CERTKV_EXPECT(!capturing_, DeviceError, "{}: a graph is being captured", what);
    check_cuda(cudaEventRecord(fetch_after_, stream_), what);
    check_cuda(cudaStreamWaitEvent(fetching_, fetch_after_, 0), what);
    for (const Fetch& f : parts)
      check_cuda(cudaMemcpyAsync(f.to, f.from, size_t(f.bytes), cudaMemcpyDeviceToHost, fetching_),
                 what);
  }
  void await_fetches(Deadline deadline) override {
    poll(fetching_, "bringing memory to the host beside other work failed", deadline);
  }

  void when(const uint32_t* word, const std::function<void()>& body) override {
    if (!capturing_) {
      copy(word_, word, sizeof *word_);
      synchronize(Deadline::after(kWhenDeadline));
      if (*word_ != 0) body();
      return;
    }
    const Condition made = condition(word);
    check_cuda(launch_condition(made.setter.handle, word, current_), kCaptureFailed);
    when_set(made.setter.handle, body);
  }

  Condition condition(const uint32_t* word) override {
    if (!capturing_) return {word, {}};
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaGraph_t graph = nullptr;
    check_cuda(capture_info(&status, &graph, nullptr, nullptr), kCaptureFailed);
    cudaGraphConditionalHandle handle{};
    check_cuda(cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault),
               kCaptureFailed);
    return {word, {true, handle}};
  }
  void when_met(const Condition& condition, const std::function<void()>& body) override {
    if (condition.setter.armed)
      when_set(condition.setter.handle, body);
    else
      when(condition.word, body);
  }

  void beside(int branch, const std::function<void()>& body) override {
    CERTKV_EXPECT(current_ == stream_, DeviceError,
                  "work beside other work begins within a conditional part or beside other work");
    const char* what = "work cannot be done beside other work";
    check_cuda(cudaEventRecord(forked_, stream_), what);
    check_cuda(cudaStreamWaitEvent(side_, forked_, 0), what);
    current_ = side_;
    try {
      body();
    } catch (...) {
      current_ = stream_;
      throw;
    }
    current_ = stream_;
    check_cuda(cudaEventRecord(done_[branch], side_), what);
    beside_[branch] = true;
  }
  void join(int branch) override {
    if (!std::exchange(beside_[branch], false)) return;
    check_cuda(cudaStreamWaitEvent(stream_, done_[branch], 0),
               "work beside other work cannot be waited for");
  }

  // A conditional node after all work so far; the condition is set by what was enqueued before.
  void when_set(cudaGraphConditionalHandle handle, const std::function<void()>& body) {
    const char* what = kCaptureFailed;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaGraph_t graph = nullptr;
    const cudaGraphNode_t* before = nullptr;
    size_t count = 0;
    check_cuda(capture_info(&status, &graph, &before, &count), what);
    cudaGraphNodeParams params{};
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = handle;
    params.conditional.type = cudaGraphCondTypeIf;
    params.conditional.size = 1;
    cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
    check_cuda(cudaGraphAddNode(&node, graph, before, nullptr, count, &params), what);
    check_cuda(cudaStreamUpdateCaptureDependencies(current_, &node, nullptr, 1,
                                                   cudaStreamSetCaptureDependencies),
               what);
#else
    check_cuda(cudaGraphAddNode(&node, graph, before, count, &params), what);
    check_cuda(
        cudaStreamUpdateCaptureDependencies(current_, &node, 1, cudaStreamSetCaptureDependencies),
        what);
#endif
    // The body is captured by a stream of its own depth.
    if (inner_.size() <= depth_) {
      cudaStream_t s = nullptr;
      check_cuda(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "a stream");
      inner_.push_back(s);
    }
    cudaStream_t outer = current_;
    current_ = inner_[depth_++];
    check_cuda(cudaStreamBeginCaptureToGraph(current_, params.conditional.phGraph_out[0], nullptr,
                                             nullptr, 0, cudaStreamCaptureModeThreadLocal),
               what);
    std::exception_ptr failed;
    try {
      body();
    } catch (...) {
      failed = std::current_exception();
    }
    const cudaError_t ended = cudaStreamEndCapture(current_, nullptr);
    current_ = outer;
    --depth_;
    if (failed) std::rethrow_exception(failed);
    check_cuda(ended, what);
  }

  std::unique_ptr<Graph> capture(const std::function<void()>& work) override {
    CERTKV_EXPECT(!capturing_, DeviceError, "a graph is being captured already");
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
               "a graph cannot be captured");
    capturing_ = true;
    std::exception_ptr failed;
    try {
      work();
    } catch (...) {
      failed = std::current_exception();
    }
    capturing_ = false;
    std::fill(std::begin(beside_), std::end(beside_), false);
    auto out = std::make_unique<CapturedGraph>();
    const cudaError_t ended = cudaStreamEndCapture(stream_, &out->graph);
    if (failed) {
      (void)cudaGetLastError();
      std::rethrow_exception(failed);
    }
    check_cuda(ended, "a graph cannot be captured");
    check_cuda(cudaGraphInstantiate(&out->executable, out->graph, 0),
               "a graph cannot be instantiated");
    return out;
  }
  void launch(Graph& graph) override {
    check_cuda(cudaGraphLaunch(dynamic_cast<CapturedGraph&>(graph).executable, stream_),
               "a graph cannot be launched");
  }

 private:
  // Until a stream has done its work. Polled, because cudaStreamSynchronize has no deadline; a
  // while without sleep, because a step is short.
  void poll(cudaStream_t stream, const char* failed, Deadline deadline) {
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      const cudaError_t error = cudaStreamQuery(stream);
      if (error == cudaSuccess) return;
      if (error != cudaErrorNotReady) check_cuda(error, failed);
      (void)cudaGetLastError();  // not ready is no error
      CERTKV_EXPECT(!deadline.passed(), DeadlineExceeded,
                    "{} has not finished its work within the deadline", name_);
      if (std::chrono::steady_clock::now() - start > std::chrono::milliseconds(50))
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  struct CapturedGraph : Graph {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    ~CapturedGraph() override {
      if (executable != nullptr) (void)cudaGraphExecDestroy(executable);
      if (graph != nullptr) (void)cudaGraphDestroy(graph);
    }
  };
  void free_streams() noexcept {
    for (cudaEvent_t event : {forked_, fetch_after_})
      if (event != nullptr) (void)cudaEventDestroy(event);
    for (cudaEvent_t event : done_)
      if (event != nullptr) (void)cudaEventDestroy(event);
    for (cudaStream_t s : {side_, fetching_, stream_})
      if (s != nullptr) (void)cudaStreamDestroy(s);
  }

  static constexpr auto kWhenDeadline = std::chrono::seconds(60);
  static constexpr const char* kCaptureFailed = "a conditional part cannot be captured";

  cudaError_t capture_info(cudaStreamCaptureStatus* status, cudaGraph_t* graph,
                           const cudaGraphNode_t** before, size_t* count) const {
#if CUDART_VERSION >= 13000
    return cudaStreamGetCaptureInfo(current_, status, nullptr, graph, before, nullptr, count);
#else
    return cudaStreamGetCaptureInfo_v2(current_, status, nullptr, graph, before, count);
#endif
  }
  std::pair<uint64_t, uint64_t> memory() const {
    size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), "the device's free memory");
    return {free, total};
  }

  int ordinal_;
  DeviceShape shape_;
  std::string name_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t current_ = nullptr;   // where work goes: stream_, or that of a body under capture
  std::vector<cudaStream_t> inner_;  // by depth
  cudaStream_t side_ = nullptr;      // what goes beside
  cudaEvent_t forked_ = nullptr, done_[kBranches] = {};
  cudaStream_t fetching_ = nullptr;
  cudaEvent_t fetch_after_ = nullptr;
  bool beside_[kBranches] = {};  // begun and not joined
  size_t depth_ = 0;
  bool capturing_ = false;
  uint32_t* word_ = nullptr;  // pinned
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
