#include "tests/support/fake_nccl.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kernels/cuda/rank_sum.h"

namespace certkv {

// ---- the device ---------------------------------------------------------------------------------

FakeStreamDevice::FakeStreamDevice() : memory_(cuda::make_emulated_device()) {}

struct FakeStreamDevice::Captured : Graph {
  std::vector<std::function<bool()>> work;
  std::vector<std::shared_ptr<void>> references;
};

void FakeStreamDevice::enqueue(std::function<bool()> work, std::shared_ptr<void> reference) {
  if (capturing_ == nullptr) return queue_.push_back(std::move(work));
  capturing_->work.push_back(std::move(work));
  capturing_->references.push_back(std::move(reference));
}
std::unique_ptr<cuda::Device::Graph> FakeStreamDevice::capture(const std::function<void()>& work) {
  auto graph = std::make_unique<Captured>();
  capturing_ = graph.get();
  try {
    work();
  } catch (...) {
    capturing_ = nullptr;
    throw;
  }
  capturing_ = nullptr;
  const std::string refusal = std::exchange(refusal_, "");
  if (!refusal.empty()) CERTKV_THROW(DeviceError, "{}", refusal);
  return graph;
}
void FakeStreamDevice::launch(Graph& graph) {
  for (const auto& work : dynamic_cast<Captured&>(graph).work) queue_.push_back(work);
}

bool FakeStreamDevice::done() {
  if (capturing_ != nullptr) throw std::logic_error("the stream is asked during a capture");
  while (!queue_.empty() && queue_.front()()) queue_.pop_front();
  return queue_.empty();
}
bool FakeStreamDevice::is_device_memory(const void* data) {
  const auto* at = static_cast<const std::byte*>(data);
  auto above = held_.upper_bound(at);
  return above != held_.begin() && at - *std::prev(above) < ptrdiff_t(1) << 20;
}
void FakeStreamDevice::sum_ranks(DType dtype, const void* parts, int ranks, uint64_t count,
                                 void* out) {
  const cuda::RankSumArgs args{.parts = static_cast<const uint16_t*>(parts),
                               .ranks = ranks,
                               .count = count,
                               .dtype = dtype,
                               .out = static_cast<uint16_t*>(out)};
  enqueue([args] {
    for (uint64_t i = 0; i < args.count; ++i) args.out[i] = cuda::rank_sum(args, i);
    return true;
  });
}
std::byte* FakeStreamDevice::allocate(uint64_t bytes, const char* what) {
  if (capturing_ != nullptr) throw std::logic_error("an allocation during a capture");
  CERTKV_EXPECT(!refuse_, OutOfMemory, "{}: {} bytes of device memory asked for, none is free",
                what, bytes);
  std::byte* memory = memory_->allocate(bytes, what);
  held_.insert(memory);
  ++allocations_;
  return memory;
}
void FakeStreamDevice::release(std::byte* memory) noexcept {
  held_.erase(memory);
  memory_->release(memory);
}
std::byte* FakeStreamDevice::allocate_host(uint64_t bytes, const char* what) {
  ++allocations_;
  return memory_->allocate_host(bytes, what);
}
void FakeStreamDevice::copy(void* to, const void* from, uint64_t bytes) {
  enqueue([=] {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return true;
  });
}
void FakeStreamDevice::fill(void* to, uint8_t byte, uint64_t bytes) {
  enqueue([=] {
    std::memset(to, byte, bytes);
    return true;
  });
}
void FakeStreamDevice::synchronize(Deadline deadline) {
  while (!done())
    CERTKV_EXPECT(!deadline.passed(), DeadlineExceeded, "the fake device is not done");
}

void FakeStreamDevice::when(const uint32_t* word, const std::function<void()>& body) {
  synchronize(Deadline::after(std::chrono::seconds(20)));
  if (*word != 0) body();
}

// ---- the library --------------------------------------------------------------------------------

class FakeNccl::State {
 public:
  struct Collective {
    std::vector<const void*> send;  // by rank, null until it has come
    int missing = 0;
    int captured = 0;  // of the ranks that have come
    std::vector<char> result;
  };
  struct Comm {
    int rank = 0, generation = 0;
    uint64_t operations = 0;  // that its stream has come to
    bool finalizing = false;
    bool over = false;           // aborted or destroyed; kept, so that late calls can be told
    std::atomic<int> graphs{0};  // operations in graphs that are alive
  };

  explicit State(int of_ranks) : ranks(of_ranks) {}

  // Runs in the rank's stream: true once the result has been written.
  bool step(const Comm& comm, uint64_t index, bool captured, const void* send, void* receive,
            size_t result_bytes, const std::function<void(Collective&)>& combine);
  NcclResult enqueue(NcclComm comm, NcclStream stream, const void* send, void* receive,
                     size_t result_bytes, std::function<void(Collective&)> combine);

  const int ranks;
  std::mutex mutex;
  Calls calls;
  std::vector<std::unique_ptr<Comm>> comms;
  bool mixed = false;  // a collective was captured by some ranks alone

 private:
  // By their number, for every communicator that the ranks have made.
  std::map<int, std::vector<std::unique_ptr<Collective>>> collectives_;
};

bool FakeNccl::State::step(const Comm& comm, uint64_t index, bool captured, const void* send,
                           void* receive, size_t result_bytes,
                           const std::function<void(Collective&)>& combine) {
  const std::lock_guard lock(mutex);
  if (comm.over) return true;  // an abort ends the kernels
  auto& collectives = collectives_[comm.generation];
  while (collectives.size() <= index) {
    collectives.push_back(std::make_unique<Collective>());
    collectives.back()->send.resize(size_t(ranks));
    collectives.back()->missing = ranks;
  }
  Collective& c = *collectives[index];
  if (c.send[size_t(comm.rank)] == nullptr) {
    c.send[size_t(comm.rank)] = send;
    c.captured += captured ? 1 : 0;
    if (--c.missing == 0) {
      mixed = mixed || (c.captured != 0 && c.captured != ranks);
      c.result.resize(result_bytes);
      combine(c);
    }
  }
  if (c.missing > 0) return false;
  if (result_bytes > 0) std::memcpy(receive, c.result.data(), result_bytes);
  return true;
}

NcclResult FakeNccl::State::enqueue(NcclComm handle, NcclStream stream, const void* send,
                                    void* receive, size_t result_bytes,
                                    std::function<void(Collective&)> combine) {
  const std::lock_guard lock(mutex);
  auto* comm = static_cast<Comm*>(handle);
  if (comm->over) throw std::logic_error("a call of a communicator that is over");
  if (send == nullptr) return NcclResult::InvalidArgument;
  auto* device = static_cast<FakeStreamDevice*>(stream);
  const bool captured = device->capturing();
  std::shared_ptr<void> reference;
  if (captured) {
    ++comm->graphs;
    reference = std::shared_ptr<void>(nullptr, [comm](void*) { --comm->graphs; });
  }
  // Numbered when the stream comes to it, at every launch anew.
  constexpr uint64_t kNew = UINT64_MAX;
  device->enqueue(
      [=, this, combine = std::move(combine), index = kNew]() mutable {
        if (index == kNew) index = comm->operations++;
        return step(*comm, index, captured, send, receive, result_bytes, combine);
      },
      std::move(reference));
  return NcclResult::Success;
}

FakeNccl::FakeNccl(int ranks) : state_(std::make_shared<State>(ranks)) {}

FakeNccl::Calls FakeNccl::calls() const {
  const std::lock_guard lock(state_->mutex);
  return state_->calls;
}

namespace {

template <typename T, typename Add>
void combine_as(const std::vector<const void*>& parts, size_t count, char* out, Add add) {
  for (size_t i = 0; i < count; ++i) {
    T sum{};
    for (size_t r = parts.size(); r-- > 0;) {
      T part;
      std::memcpy(&part, static_cast<const char*>(parts[r]) + i * sizeof(T), sizeof(T));
      sum = r + 1 == parts.size() ? part : add(sum, part);
    }
    std::memcpy(out + i * sizeof(T), &sum, sizeof(T));
  }
}

size_t bytes_of(NcclType type) {
  return type == NcclType::Uint8 ? 1 : type == NcclType::Float32 ? 4 : 8;
}

}  // namespace

NcclApi FakeNccl::api() {
  const std::shared_ptr<State> state = state_;
  NcclApi api;
  api.name = "fake NCCL";
  api.version = 22809;
  api.get_unique_id = [state](NcclUniqueId* id) {
    const std::lock_guard lock(state->mutex);
    ++state->calls.unique_ids;
    id->fill('u');
    return NcclResult::Success;
  };
  api.init_rank = [state](NcclComm* comm, int ranks, const NcclUniqueId& id, int rank) {
    const std::lock_guard lock(state->mutex);
    if (ranks != state->ranks || id.back() != 'u') return NcclResult::InvalidArgument;
    ++state->calls.inits;
    state->comms.push_back(std::make_unique<State::Comm>());
    state->comms.back()->rank = rank;
    for (const auto& other : state->comms)
      state->comms.back()->generation += other->rank == rank && other != state->comms.back();
    *comm = state->comms.back().get();
    return NcclResult::InProgress;
  };
  api.get_async_error = [state](NcclComm comm, NcclResult* result) {
    const std::lock_guard lock(state->mutex);
    const auto* c = static_cast<State::Comm*>(comm);
    if (c->over) return NcclResult::InvalidUsage;
    const bool starts = state->calls.inits < state->ranks * (c->generation + 1);
    const bool held = c->finalizing && c->graphs > 0;
    *result = state->mixed     ? NcclResult::InvalidUsage
              : starts || held ? NcclResult::InProgress
                               : NcclResult::Success;
    return NcclResult::Success;
  };
  api.all_reduce = [state](const void* send, void* receive, size_t count, NcclType type, NcclOp op,
                           NcclComm comm, NcclStream stream) {
    const bool known = type == NcclType::Uint64 || (type == NcclType::Float32 && op == NcclOp::Sum);
    if (!known) return NcclResult::InvalidArgument;
    return state->enqueue(
        comm, stream, send, receive, count * bytes_of(type), [=](State::Collective& c) {
          if (type == NcclType::Float32) {
            combine_as<float>(c.send, count, c.result.data(),
                              [](float a, float b) { return a + b; });
          } else if (op == NcclOp::Sum) {
            combine_as<uint64_t>(c.send, count, c.result.data(),
                                 [](uint64_t a, uint64_t b) { return a + b; });
          } else {
            combine_as<uint64_t>(c.send, count, c.result.data(),
                                 [](uint64_t a, uint64_t b) { return std::max(a, b); });
          }
        });
  };
  api.all_gather = [state](const void* send, void* receive, size_t send_count, NcclType type,
                           NcclComm comm, NcclStream stream) {
    const size_t bytes = send_count * bytes_of(type);
    return state->enqueue(comm, stream, send, receive, bytes * size_t(state->ranks),
                          [=](State::Collective& c) {
                            for (size_t r = 0; r < c.send.size() && bytes > 0; ++r)
                              std::memcpy(c.result.data() + r * bytes, c.send[r], bytes);
                          });
  };
  api.broadcast = [state](const void* send, void* receive, size_t count, NcclType type, int root,
                          NcclComm comm, NcclStream stream) {
    const size_t bytes = count * bytes_of(type);
    return state->enqueue(comm, stream, send, receive, bytes, [=](State::Collective& c) {
      if (bytes > 0) std::memcpy(c.result.data(), c.send[size_t(root)], bytes);
    });
  };
  api.finalize = [state](NcclComm comm) {
    const std::lock_guard lock(state->mutex);
    ++state->calls.finalizes;
    static_cast<State::Comm*>(comm)->finalizing = true;
    return NcclResult::Success;
  };
  const auto end = [state](int Calls::*count) {
    return [=](NcclComm handle) {
      auto* comm = static_cast<State::Comm*>(handle);
      {
        const std::lock_guard lock(state->mutex);
        ++(state->calls.*count);
        comm->over = true;
      }
      while (comm->graphs > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return NcclResult::Success;
    };
  };
  api.destroy = end(&Calls::destroys);
  api.abort = end(&Calls::aborts);
  api.last_error = [](NcclComm) { return std::string(); };
  return api;
}

}  // namespace certkv
