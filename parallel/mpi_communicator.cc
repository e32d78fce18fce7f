#include "parallel/mpi_communicator.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <functional>
#include <optional>

#include "kernels/base/failpoint.h"
#include "parallel/group_life.h"
#include "parallel/mpi_world.h"
#include "parallel/ordered_sum.h"
#include "parallel/verdict_reduce.h"
#include "parallel/view_checks.h"

namespace certkv {
namespace {

constexpr size_t kSumPiece = size_t(1) << 19;  // elements

int mpi_count(size_t count, const char* what, const char* unit = "elements") {
  CERTKV_EXPECT(count <= size_t(INT_MAX), InvalidArgument,
                "{}: {} {}; one operation over MPI moves at most {}: use several", what, count, unit,
                INT_MAX);
  return int(count);
}

class MpiCommunicator final : public Communicator, private GroupLife {
 public:
  MpiCommunicator(std::shared_ptr<MpiWorld> world, MPI_Comm comm, int slot)
      : world_(std::move(world)), comm_(comm), slot_(slot) {
    members_ = world_->members(comm_);
    rank_ = int(std::find(members_.begin(), members_.end(), world_->rank()) - members_.begin());
  }
  ~MpiCommunicator() override {
    // Memory of operations under way is about to go.
    if (!under_way_.empty() && !world_->muted()) {
      world_->fail(ErrorKind::CommError,
                   fmt::format("{} left with operations under way", peer_name(rank_)));
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return int(members_.size()); }

  void all_reduce_sum(TensorView inout, Stream) override {
    check_sum(inout);
    // In pieces, so that counts stay far below an int and the pieces overlap on the wire.
    size_t at = 0;
    do {
      TensorView piece = inout;
      piece.data = static_cast<char*>(inout.data) + at * dtype_bytes(inout.dtype);
      piece.count = std::min(kSumPiece, inout.count - at);
      sum_piece(piece);
      at += piece.count;
    } while (at < inout.count);
  }

  void all_gather(TensorView in, TensorView out, Stream) override {
    check_gather(in, out, rank_, size());
    mpi_count(out.bytes(), "all_gather", "bytes");
    const int bytes = int(in.bytes());
    enqueue("all_gather", out.bytes(), [&](Operation& op) {
      const char* own = static_cast<char*>(out.data) + size_t(rank_) * in.bytes();
      const void* from = in.data == own ? MPI_IN_PLACE : in.data;
      return MPI_Iallgather(from, bytes, MPI_BYTE, out.data, bytes, MPI_BYTE, comm_, &op.request);
    });
  }

  void broadcast(TensorView inout, int root, Stream) override {
    check_broadcast(inout, root, size());
    const int bytes = mpi_count(inout.bytes(), "broadcast", "bytes");
    enqueue("broadcast", inout.bytes(), [&](Operation& op) {
      return MPI_Ibcast(inout.data, bytes, MPI_BYTE, root, comm_, &op.request);
    });
  }

  void reduce_verdict(std::span<VerdictRecord> inout, Stream) override {
    const int count = mpi_count(inout.size(), "reduce_verdict");
    enqueue("reduce_verdict", inout.size_bytes(), [&](Operation& op) {
      op.staging.resize(inout.size_bytes());
      if (count > 0) std::memcpy(op.staging.data(), inout.data(), inout.size_bytes());
      std::fill(inout.begin(), inout.end(), failed_verdict());
      op.finish = [inout](Operation& done) {
        if (!inout.empty()) std::memcpy(inout.data(), done.staging.data(), inout.size_bytes());
      };
      return MPI_Iallreduce(MPI_IN_PLACE, op.staging.data(), count, world_->verdict_type(),
                            world_->verdict_op(), comm_, &op.request);
    });
  }

  void barrier(Stream) override {
    enqueue("barrier", 0, [&](Operation& op) { return MPI_Ibarrier(comm_, &op.request); });
  }

  using Communicator::wait;
  void wait(std::chrono::milliseconds silence) override;

  void poll_error() override {
    if (world_->life().broken() || world_->muted()) world_->throw_broken();
  }
  void alive() noexcept override { world_->life().alive(world_->rank()); }
  void abort(std::string_view reason) noexcept override {
    world_->fail(ErrorKind::CommError, fmt::format("{} gave up: {}", peer_name(rank_), reason));
  }
  std::string peer_name(int rank) const override {
    return world_->life().name(members_[size_t(rank)]);
  }
  GroupLife& group_life() override { return *this; }

 private:
  LifeTable& life() override { return world_->life(); }
  const std::vector<int>& members() const override { return members_; }
  void set_upper_arrived(uint64_t operations) noexcept override {
    world_->life().set_arrived(world_->rank(), slot_, enqueued_ + operations);
  }
  uint64_t upper_arrived(int rank) const override {
    const uint64_t all = world_->life().arrived(members_[size_t(rank)], slot_);
    return all < enqueued_ ? 0 : all - enqueued_;
  }
  void fail(ErrorKind kind, const std::string& message) noexcept override {
    world_->fail(kind, message);
  }

  struct Operation {
    const char* name = "";
    size_t bytes = 0;
    MPI_Request request = MPI_REQUEST_NULL;
    std::vector<char> staging;
    std::function<void(Operation&)> finish;  // once it is done
  };

  void sum_piece(TensorView inout) {
    const int count = int(inout.count);
    if (inout.dtype == DType::F32 || inout.dtype == DType::U64) {
      const MPI_Datatype type = inout.dtype == DType::F32 ? MPI_FLOAT : MPI_UINT64_T;
      enqueue("all_reduce_sum", inout.bytes(), [&](Operation& op) {
        return MPI_Iallreduce(MPI_IN_PLACE, inout.data, count, type, MPI_SUM, comm_, &op.request);
      });
      return;
    }
    enqueue("all_reduce_sum", inout.bytes() * members_.size(), [&](Operation& op) {
      op.staging.resize(inout.bytes() * members_.size());
      op.finish = [this, inout](Operation& done) {
        std::vector<const void*> parts;
        for (size_t r = 0; r < members_.size(); ++r) {
          parts.push_back(done.staging.data() + r * inout.bytes());
        }
        ordered_sum(inout.dtype, parts.data(), parts.size(), inout.count, inout.data);
      };
      return MPI_Iallgather(inout.data, count, MPI_UINT16_T, op.staging.data(), count, MPI_UINT16_T,
                            comm_, &op.request);
    });
  }

  template <typename Start>
  void enqueue(const char* name, size_t bytes, Start&& start);
  bool poll();  // finishes what is done, in any order; true when nothing is under way
  [[noreturn]] void throw_failure(const Error& error);

  std::shared_ptr<MpiWorld> world_;
  MPI_Comm comm_;
  int slot_;  // of this group in the table of arrivals
  int rank_ = 0;
  std::vector<int> members_;  // ranks of the world
  uint64_t enqueued_ = 0;
  std::vector<std::unique_ptr<Operation>> under_way_;
};

template <typename Start>
void MpiCommunicator::enqueue(const char* name, size_t bytes, Start&& start) {
  world_->life().alive(world_->rank());
  auto op = std::make_unique<Operation>();
  op->name = name;
  op->bytes = bytes;
  int code = MPI_SUCCESS;
  {
    const auto lock = world_->enter();
    code = start(*op);
  }
  under_way_.push_back(std::move(op));
  ++enqueued_;
  if (code == MPI_SUCCESS) return;
  try {
    mpi_check(code, name);
  } catch (const Error& error) {
    throw_failure(error);
  }
}

void MpiCommunicator::throw_failure(const Error& error) {
  world_->fail(error.kind(), error.what());
  world_->throw_broken();
}

bool MpiCommunicator::poll() {
  {
    const auto lock = world_->enter();
    for (auto& op : under_way_) {
      int done = 0;
      mpi_check(MPI_Test(&op->request, &done, MPI_STATUS_IGNORE), op->name);
      if (!done) return false;  // later ones seldom overtake
    }
  }
  for (auto& op : under_way_) {
    if (op->finish) op->finish(*op);
  }
  under_way_.clear();
  return true;
}

void MpiCommunicator::wait(std::chrono::milliseconds silence) {
  if (under_way_.empty()) return alive();
  world_->life().set_arrived(world_->rank(), slot_, enqueued_);
  try {
    CERTKV_FAILPOINT(ranks_wait);
    size_t bytes = 0;
    for (const auto& op : under_way_) bytes += op->bytes;
    SilenceWatch watch(world_->life(), world_->rank(), silence, under_way_.front()->name);
    // Where work may be silent for longer (a rank loads its weights), its process may not.
    std::optional<SilenceWatch> beats;
    if (silence > this->silence())
      beats.emplace(world_->life(), world_->rank(), this->silence(), under_way_.front()->name);
    std::vector<SilenceWatch::Peer> peers;
    PollPause pause;
    while (!poll()) {
      if (watch.due()) {
        peers.clear();
        for (int member : members_) {
          if (member == world_->rank()) continue;
          peers.push_back({member, world_->life().arrived(member, slot_) >= enqueued_});
        }
        if (beats) {
          std::vector<SilenceWatch::Peer> processes = peers;
          for (SilenceWatch::Peer& p : processes) p.has_come = true;
          beats->check(processes, silence);
        }
        watch.check(peers, std::chrono::milliseconds(bytes >> 14));
      }
      pause.pause();
    }
  } catch (const Error& error) {
    throw_failure(error);
  }
}

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(std::shared_ptr<MpiWorld> world, int color) {
  const int slot = world->next_group_slot();
  const MPI_Comm comm = world->split(color);
  if (comm == MPI_COMM_NULL) return nullptr;
  return std::make_unique<MpiCommunicator>(std::move(world), comm, slot);
}

}  // namespace certkv
