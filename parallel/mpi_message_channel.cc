#include "parallel/mpi_message_channel.h"

#include <algorithm>
#include <deque>
#include <list>

#include "parallel/mpi_world.h"

namespace certkv {
namespace {

constexpr int kTag = 2;

class MpiMessageChannel final : public MessageChannel {
 public:
  MpiMessageChannel(std::shared_ptr<MpiWorld> world, MPI_Comm comm)
      : world_(std::move(world)), comm_(comm) {
    members_ = world_->members(comm_);
    rank_ = int(std::find(members_.begin(), members_.end(), world_->rank()) - members_.begin());
  }
  ~MpiMessageChannel() override {
    if ((!sends_.empty() || !arriving_.empty()) && !world_->muted()) {
      world_->fail(ErrorKind::CommError, fmt::format("{} left with messages under way: flush() first",
                                                     world_->life().name(world_->rank())));
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return int(members_.size()); }

  void send(int to, std::string_view bytes) override {
    CERTKV_EXPECT(to >= 0 && to < size(), InvalidArgument, "send: no rank {} in a channel of {}", to,
                  size());
    CERTKV_EXPECT(bytes.size() <= kMaxMessageBytes, InvalidArgument,
                  "send: {} bytes; a message has at most {}", bytes.size(), kMaxMessageBytes);
    world_->life().alive(world_->rank());
    guarded([&] {
      const auto lock = world_->enter();
      Transfer& t = sends_.emplace_back();
      t.peer = to;
      t.bytes = bytes;
      mpi_check(MPI_Isend(t.bytes.data(), int(t.bytes.size()), MPI_BYTE, to, kTag, comm_, &t.request),
                "MPI_Isend");
      drop_done_sends();
    });
  }

  std::optional<Message> try_receive() override {
    world_->life().alive(world_->rank());
    std::optional<Message> message;
    guarded([&] { message = pump(-1); });
    return message;
  }

  Message receive(int from, std::chrono::milliseconds silence) override {
    CERTKV_EXPECT(from >= 0 && from < size(), InvalidArgument,
                  "receive: no rank {} in a channel of {}", from, size());
    const SilenceWatch::Peer sender{members_[size_t(from)], false};
    std::optional<Message> message;
    guarded([&] {
      SilenceWatch watch(world_->life(), world_->rank(), silence, "receive");
      PollPause pause;
      while (!(message = pump(from))) {
        if (watch.due()) watch.check({&sender, 1}, {});
        pause.pause();
      }
    });
    return std::move(*message);
  }

  void flush(std::chrono::milliseconds silence) override {
    guarded([&] {
      SilenceWatch watch(world_->life(), world_->rank(), silence, "flush");
      PollPause pause;
      std::vector<SilenceWatch::Peer> receivers;
      while (true) {
        {
          const auto lock = world_->enter();
          drop_done_sends();
          match();  // two ranks that flush large messages to each other must both receive
        }
        if (sends_.empty()) return;
        if (watch.due()) {
          receivers.clear();
          for (const Transfer& t : sends_) receivers.push_back({members_[size_t(t.peer)], false});
          watch.check(receivers, {});
        }
        pause.pause();
      }
    });
  }

 private:
  struct Transfer {
    int peer = 0;
    std::string bytes;
    MPI_Request request = MPI_REQUEST_NULL;
    bool done = false;
  };

  template <typename F>
  void guarded(F&& f) {
    try {
      f();
    } catch (const Error& error) {
      world_->fail(error.kind(), error.what());
      world_->throw_broken();
    }
  }

  // Under the lock.
  void drop_done_sends() {
    for (Transfer& t : sends_) {
      int done = 0;
      mpi_check(MPI_Test(&t.request, &done, MPI_STATUS_IGNORE), "MPI_Test");
      t.done = done;
    }
    sends_.remove_if([](const Transfer& t) { return t.done; });
  }

  // Under the lock: begins to receive everything that is here.
  void match() {
    while (true) {
      int here = 0, count = 0;
      MPI_Message handle = MPI_MESSAGE_NULL;
      MPI_Status status{};
      mpi_check(MPI_Improbe(MPI_ANY_SOURCE, kTag, comm_, &here, &handle, &status), "MPI_Improbe");
      if (!here) return;
      mpi_check(MPI_Get_count(&status, MPI_BYTE, &count), "MPI_Get_count");
      Transfer& t = arriving_.emplace_back();
      t.peer = status.MPI_SOURCE;
      t.bytes.resize(size_t(count));
      mpi_check(MPI_Imrecv(t.bytes.data(), count, MPI_BYTE, &handle, &t.request), "MPI_Imrecv");
    }
  }

  // The next whole message from `from`, -1 anybody. One that arrives piecemeal holds back the later
  // ones of its sender.
  std::optional<Message> pump(int from) {
    const auto lock = world_->enter();
    drop_done_sends();
    match();
    std::vector<bool> held(members_.size());
    for (auto it = arriving_.begin(); it != arriving_.end(); ++it) {
      if (!it->done) {
        int done = 0;
        mpi_check(MPI_Test(&it->request, &done, MPI_STATUS_IGNORE), "MPI_Test");
        it->done = done;
      }
      if (it->done && !held[size_t(it->peer)] && (from < 0 || from == it->peer)) {
        Message message{it->peer, std::move(it->bytes)};
        arriving_.erase(it);
        return message;
      }
      held[size_t(it->peer)] = true;
    }
    return std::nullopt;
  }

  std::shared_ptr<MpiWorld> world_;
  MPI_Comm comm_;
  int rank_ = 0;
  std::vector<int> members_;
  std::list<Transfer> sends_, arriving_;  // addresses of their bytes stay; in the order matched
};

}  // namespace

std::unique_ptr<MessageChannel> make_mpi_message_channel(std::shared_ptr<MpiWorld> world, int color) {
  const MPI_Comm comm = world->split(color);
  if (comm == MPI_COMM_NULL) return nullptr;
  return std::make_unique<MpiMessageChannel>(std::move(world), comm);
}

}  // namespace certkv
