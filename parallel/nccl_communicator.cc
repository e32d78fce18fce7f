#include "parallel/nccl_communicator.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "kernels/base/log.h"
#include "parallel/group_life.h"
#include "parallel/liveness.h"
#include "parallel/nccl_device.h"
#include "parallel/nccl_handle.h"
#include "parallel/nccl_staging.h"
#include "parallel/verdict_reduce.h"
#include "parallel/view_checks.h"

namespace certkv {
namespace {

constexpr Moves kMoves = Moves::HostAndDeviceMemory;
// Elements that a sum in rank order gathers at a time: bounds the memory for it.
constexpr size_t kOrderedPiece = size_t(1) << 21;
constexpr size_t kBytesPerMillisecond = size_t(1) << 14;  // see nccl_communicator.h
constexpr int kYields = 20000;  // some 20 ms: a sleep would cost a decode step more than it saves

class NcclRank final : public NcclCommunicator {
 public:
  NcclRank(std::unique_ptr<Communicator> control, std::shared_ptr<const NcclApi> api,
           NcclDevice& device, const NcclOptions& options)
      : control_(std::move(control)),
        life_(control_->group_life()),
        device_(device),
        options_(options),
        handle_(api, control_->peer_name(control_->rank())),
        on_device_(device.device(), "NCCL's staging"),
        pinned_(device.device(), "NCCL's staging") {
    set_silence(control_->silence());
    set_up(*api);
  }
  ~NcclRank() override;

  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }

  void all_reduce_sum(TensorView inout, Stream stream) override {
    check_sum(inout, kMoves);
    enqueue("all_reduce_sum", inout.bytes(), stream, {inout}, [&] {
      std::byte* data = to_device(inout);
      sum(inout.dtype, data, inout.count);
      to_caller(data, inout);
    });
  }

  void all_gather(TensorView in, TensorView out, Stream stream) override {
    check_gather(in, out, rank(), size(), kMoves);
    enqueue("all_gather", out.bytes(), stream, {in, out}, [&] {
      const std::byte* own = to_device(in);
      std::byte* all = out.memory == MemoryKind::Device ? static_cast<std::byte*>(out.data)
                                                        : on_device_.take(out.bytes());
      gather(own, all, in.bytes());
      to_caller(all, out);
    });
  }

  void broadcast(TensorView inout, int root, Stream stream) override {
    check_broadcast(inout, root, size(), kMoves);
    enqueue("broadcast", inout.bytes(), stream, {inout}, [&] {
      std::byte* data = to_device(inout);
      call([&](const NcclApi& api, NcclComm comm) {
        return api.broadcast(data, data, inout.bytes(), NcclType::Uint8, root, comm,
                             device_.stream());
      });
      if (rank() != root) to_caller(data, inout);
    });
  }

  void reduce_verdict(std::span<VerdictRecord> inout, Stream stream) override;

  void barrier(Stream stream) override {
    CERTKV_EXPECT(!capturing_, InvalidArgument, "a barrier is not captured");
    enqueue("barrier", 0, stream, {}, [&] {
      std::byte* word = on_device_.take(sizeof(uint64_t));
      device_.device().fill(word, 0, sizeof(uint64_t));
      reduce(word, word, 1, NcclType::Uint64, NcclOp::Sum);
    });
  }

  using Communicator::wait;
  void wait(std::chrono::milliseconds silence) override;

  std::string capture(uint64_t number, const std::function<void()>& work) override;
  void launch(uint64_t number) override;
  void forget(uint64_t number) noexcept override { captured_.erase(number); }
  void discard() noexcept override {
    captured_.clear();
    handle_.abort();
  }

  void poll_error() override {
    try {
      life_.life().throw_if_broken();
      handle_.settled("poll_error");
    } catch (const Error& error) {
      life_.fail(error.kind(), error.what());
      handle_.abort();  // not waited for
      life_.life().throw_if_broken();
      throw;
    }
  }
  void alive() noexcept override { control_->alive(); }
  void abort(std::string_view reason) noexcept override {
    control_->abort(reason);
    handle_.abort();
  }
  std::string peer_name(int rank) const override { return control_->peer_name(rank); }
  GroupLife& group_life() override { return life_; }

 private:
  struct Finish {
    const std::byte* from = nullptr;  // pinned
    void* to = nullptr;
    size_t bytes = 0;
  };

  void set_up(const NcclApi& api);
  void agree_on_version(const NcclApi& api);

  // ---- one operation: steps into the stream -----------------------------------------------------

  template <typename Steps>
  void enqueue(const char* name, size_t bytes, Stream stream,
               std::initializer_list<TensorView> views, Steps&& steps);

  // Where the view's data is on the device; of a host view, after a copy.
  std::byte* to_device(const TensorView& view) {
    if (view.memory == MemoryKind::Device) return static_cast<std::byte*>(view.data);
    std::byte* data = on_device_.take(view.bytes());
    std::byte* pinned = pinned_.take(view.bytes());
    if (view.count > 0) std::memcpy(pinned, view.data, view.bytes());
    device_.device().copy(data, pinned, view.bytes());
    return data;
  }
  // Brings the result to a host view, once it has been waited for.
  void to_caller(const std::byte* data, const TensorView& view) {
    if (view.memory == MemoryKind::Device) return;
    std::byte* pinned = pinned_.take(view.bytes());
    device_.device().copy(pinned, data, view.bytes());
    finish_.push_back({pinned, view.data, view.bytes()});
  }

  // A call that NCCL goes on with by itself (it connects to peers) has not yet reached the stream,
  // and what follows must not overtake it.
  template <typename Function>
  void call(Function&& f) {
    handle_.call(what_, std::forward<Function>(f));
    if (!handle_.settled(what_)) {
      life_.set_upper_arrived(enqueued_ + 1);
      watch_until([&] { return handle_.settled(what_); }, enqueued_ + 1, silence(), {});
    }
  }
  void reduce(const void* from, void* to, size_t count, NcclType type, NcclOp op) {
    call([&](const NcclApi& api, NcclComm comm) {
      return api.all_reduce(from, to, count, type, op, comm, device_.stream());
    });
  }
  void gather(const void* own, void* all, size_t bytes) {
    call([&](const NcclApi& api, NcclComm comm) {
      return api.all_gather(own, all, bytes, NcclType::Uint8, comm, device_.stream());
    });
  }
  void sum(DType dtype, std::byte* data, size_t count) {
    switch (nccl_sum(dtype)) {
      case NcclSum::Float32:
        return reduce(data, data, count, NcclType::Float32, NcclOp::Sum);
      case NcclSum::Uint64:
        return reduce(data, data, count, NcclType::Uint64, NcclOp::Sum);
      case NcclSum::InRankOrder:
        break;
      case NcclSum::None:
        CERTKV_THROW(InvalidArgument, "no sums of {}", dtype_name(dtype));
    }
    const size_t bytes = dtype_bytes(dtype);
    const size_t piece = std::min(count, kOrderedPiece);
    std::byte* parts = on_device_.take(piece * bytes * size_t(size()));
    for (size_t at = 0; at < count; at += piece) {
      const size_t n = std::min(piece, count - at);
      gather(data + at * bytes, parts, n * bytes);
      device_.sum_ranks(dtype, parts, size(), n, data + at * bytes);
    }
  }

  // ---- waiting and giving up --------------------------------------------------------------------

  // Polls until `over`, while the peers that have not come to `operations` must work, and the
  // others live; all come and alive, `extra` more.
  template <typename Over>
  void watch_until(Over&& over, uint64_t operations, std::chrono::milliseconds silence,
                   std::chrono::milliseconds extra) {
    const std::vector<int>& members = life_.members();
    const int self = members[size_t(rank())];
    SilenceWatch watch(life_.life(), self, silence, what_);
    std::vector<SilenceWatch::Peer> peers;
    PollPause pause(kYields);
    while (!over()) {
      life_.life().throw_if_broken();
      if (watch.due()) {
        peers.clear();
        for (int r = 0; r < size(); ++r) {
          if (r != rank())
            peers.push_back({members[size_t(r)], life_.upper_arrived(r) >= operations});
        }
        watch.check(peers, extra);
      }
      pause.pause();
    }
  }

  void throw_if_broken() {
    if (life_.life().broken()) stop();
    life_.life().throw_if_broken();
  }
  // Aborts NCCL, and waits a little for that. The abort ends as soon as no graph is left; one that
  // runs goes with the end of its kernels, which the abort brings about.
  void stop() noexcept {
    handle_.abort();
    captured_.clear();
    if (stopped_) return;
    stopped_ = true;
    if (handle_.wait_abort(options_.abort_time)) return;
    hung_ = true;
    log_error(
        "{}: NCCL has not given up its communicator after {} ms (ncclCommAbort); the GPU is "
        "free again only when this process has ended",
        peer_name(rank()), options_.abort_time.count() * kDeadlineFactor);
  }
  [[noreturn]] void give_up(const Error& error) {
    const bool late = error.kind() == ErrorKind::DeadlineExceeded && !life_.life().broken();
    life_.fail(error.kind(),
               fmt::format("{}{}", error.what(),
                           late ? "; NCCL is aborted (NCCL_DEBUG=INFO shows its transports)" : ""));
    stop();
    life_.life().throw_if_broken();
    throw error;
  }

  std::unique_ptr<Communicator> control_;
  GroupLife& life_;
  NcclDevice& device_;
  NcclOptions options_;
  NcclHandle handle_;
  NcclArena<cuda::DeviceArray<std::byte>> on_device_;
  NcclArena<cuda::HostArray<std::byte>> pinned_;
  const char* what_ = "";   // the operation, for errors
  const char* first_ = "";  // of those under way
  uint64_t enqueued_ = 0;
  size_t bytes_ = 0;  // moved by what is under way
  int under_way_ = 0;
  struct Captured {
    std::unique_ptr<cuda::Device::Graph> graph;
    size_t bytes = 0;  // moved by a launch
  };
  std::map<uint64_t, Captured> captured_;
  bool capturing_ = false;
  size_t capturing_bytes_ = 0;
  std::vector<Finish> finish_;  // of what is under way
  struct Votes {
    std::span<VerdictRecord> inout;
    const uint64_t* reduced;  // pinned, see split_verdicts
  };
  std::vector<Votes> votes_;
  bool stopped_ = false, hung_ = false;
};

// ---- from set-up to the end ---------------------------------------------------------------------

void NcclRank::agree_on_version(const NcclApi& api) {
  uint64_t own = uint64_t(api.version);
  std::vector<uint64_t> all(static_cast<size_t>(size()));
  control_->all_gather(view_u64(&own, 1), view_u64(all.data(), all.size()), {});
  control_->wait(silence());
  for (int r = 0; r < size(); ++r) {
    CERTKV_EXPECT(
        all[size_t(r)] == all[0], CommError,
        "{} has NCCL {}, {} has {}: all ranks need the same libnccl.so.2 (LD_LIBRARY_PATH)",
        peer_name(0), nccl_version_text(int(all[0])), peer_name(r),
        nccl_version_text(int(all[size_t(r)])));
  }
}

void NcclRank::set_up(const NcclApi& api) {
  what_ = "the start of NCCL";
  try {
    agree_on_version(api);
    NcclUniqueId id{};
    if (rank() == 0) {
      const NcclResult result = api.get_unique_id(&id);
      CERTKV_EXPECT(result == NcclResult::Success, CommError, "{}",
                    describe_nccl_failure(result, "ncclGetUniqueId", peer_name(0), "", api.name));
    }
    control_->broadcast({id.data(), id.size(), DType::U8, MemoryKind::Host}, 0, {});
    control_->wait(silence());
    ++enqueued_;
    life_.set_upper_arrived(enqueued_);
    handle_.start(size(), id, rank());
    watch_until([&] { return handle_.settled(what_); }, enqueued_, silence(), options_.init_time);
  } catch (const Error& error) {
    give_up(error);
  }
}

NcclRank::~NcclRank() {
  LifeTable& life = life_.life();
  if (under_way_ == 0) captured_.clear();  // or close() would wait for it
  if (under_way_ > 0 && !life.broken()) {
    life_.fail(ErrorKind::CommError,
               fmt::format("{} left with operations under way", peer_name(rank())));
  }
  if (life.broken()) {
    stop();
  } else if (!handle_.close(silence())) {
    stop();
  }
  if (hung_) {
    on_device_.abandon();
    pinned_.abandon();
  }
}

// ---- operations ---------------------------------------------------------------------------------

template <typename Steps>
void NcclRank::enqueue(const char* name, size_t bytes, Stream stream,
                       std::initializer_list<TensorView> views, Steps&& steps) {
  CERTKV_EXPECT(stream.handle == nullptr || stream.handle == device_.stream(), InvalidArgument,
                "{}: the stream is not the one of the communicator's device", name);
  for (const TensorView& view : views) {
    CERTKV_EXPECT(
        view.memory == MemoryKind::Host || view.count == 0 || device_.is_device_memory(view.data),
        InvalidArgument, "{}: the view says device memory, but its data is not on {}", name,
        device_.device().name());
    CERTKV_EXPECT(view.memory == MemoryKind::Device || !capturing_, InvalidArgument,
                  "{}: a view of host memory cannot be captured", name);
  }
  throw_if_broken();
  alive();
  what_ = name;
  if (capturing_) {
    steps();
    capturing_bytes_ += bytes;
    return;
  }
  if (under_way_ == 0) first_ = name;
  try {
    steps();
  } catch (const Error& error) {
    give_up(error);  // it is half enqueued: the ranks are no longer in step
  }
  ++enqueued_;
  ++under_way_;
  bytes_ += bytes;
}

std::string NcclRank::capture(uint64_t number, const std::function<void()>& work) {
  throw_if_broken();
  CERTKV_EXPECT(under_way_ == 0, InvalidArgument, "a capture with {} operations under way",
                under_way_);
  captured_.erase(number);
  capturing_ = true;
  capturing_bytes_ = 0;
  what_ = "the capture of a graph";
  std::string refused;
  try {
    auto graph = device_.device().capture(work);
    captured_[number] = {std::move(graph), capturing_bytes_};
  } catch (const Error& error) {
    capturing_ = false;
    if (error.kind() == ErrorKind::InvalidArgument) throw;
    const bool of_nccl_or_device =
        error.kind() == ErrorKind::CommError || error.kind() == ErrorKind::DeviceError;
    if (life_.life().broken() || !of_nccl_or_device) give_up(error);
    refused = error.what();
  }
  capturing_ = false;
  on_device_.reset();
  ++enqueued_;  // for peers, who may be in the midst of their capture
  return refused;
}

void NcclRank::launch(uint64_t number) {
  const auto captured = captured_.find(number);
  CERTKV_EXPECT(captured != captured_.end() || life_.life().broken(), InvalidArgument,
                "nothing has been captured as number {}", number);
  throw_if_broken();
  alive();
  what_ = "a captured step";
  if (under_way_ == 0) first_ = what_;
  try {
    device_.device().launch(*captured->second.graph);
  } catch (const Error& error) {
    give_up(error);
  }
  ++enqueued_;
  ++under_way_;
  bytes_ += captured->second.bytes;
}

void NcclRank::reduce_verdict(std::span<VerdictRecord> inout, Stream stream) {
  CERTKV_EXPECT(!capturing_, InvalidArgument, "verdicts lie in host memory: they are not captured");
  const size_t n = inout.size(), max_words = n * kVerdictMaxWords;
  const size_t words = n * kVerdictWords, bytes = words * sizeof(uint64_t);
  enqueue("reduce_verdict", bytes, stream, {}, [&] {
    const auto take = [bytes](auto& arena) {
      return reinterpret_cast<uint64_t*>(arena.take(bytes));
    };
    uint64_t* votes = take(pinned_);
    uint64_t* failed = take(pinned_);
    uint64_t* result = take(pinned_);
    split_verdicts(inout.data(), n, votes);
    std::fill(inout.begin(), inout.end(), failed_verdict());
    split_verdicts(inout.data(), n, failed);
    std::copy_n(failed, words, result);
    // The result is written beside the votes, over failed verdicts: what NCCL leaves out has
    // failed.
    uint64_t* send = take(on_device_);
    uint64_t* receive = take(on_device_);
    device_.device().copy(send, votes, bytes);
    device_.device().copy(receive, failed, bytes);
    reduce(send, receive, max_words, NcclType::Uint64, NcclOp::Max);
    reduce(send + max_words, receive + max_words, words - max_words, NcclType::Uint64, NcclOp::Sum);
    device_.device().copy(result, receive, bytes);
    votes_.push_back({inout, result});
  });
}

void NcclRank::wait(std::chrono::milliseconds silence) {
  throw_if_broken();
  what_ = under_way_ > 0 ? first_ : "the stream's work";
  try {
    life_.set_upper_arrived(enqueued_);
    // Errors are asked for after the stream: NCCL's kernels may end because of one.
    const auto over = [&] {
      const bool done = device_.done();
      return handle_.settled(what_) && done;
    };
    watch_until(over, enqueued_, silence, std::chrono::milliseconds(bytes_ / kBytesPerMillisecond));
    throw_if_broken();  // a result made while a peer gave up is none
  } catch (const Error& error) {
    give_up(error);
  }
  for (const Finish& f : finish_) {
    if (f.bytes > 0) std::memcpy(f.to, f.from, f.bytes);
  }
  for (const Votes& v : votes_) join_verdicts(v.reduced, v.inout.size(), v.inout.data());
  finish_.clear();
  votes_.clear();
  under_way_ = 0;
  bytes_ = 0;
  on_device_.reset();
  pinned_.reset();
}

}  // namespace

std::unique_ptr<NcclCommunicator> make_nccl_communicator(std::unique_ptr<Communicator> control,
                                                         std::shared_ptr<const NcclApi> api,
                                                         NcclDevice& device,
                                                         const NcclOptions& options) {
  return std::make_unique<NcclRank>(std::move(control), std::move(api), device, options);
}

}  // namespace certkv
