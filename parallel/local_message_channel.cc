#include "parallel/local_message_channel.h"

#include <algorithm>

#include "parallel/local_world.h"

namespace certkv {

LocalMailboxes::LocalMailboxes(LifeTable& life, std::vector<int> members)
    : life_(life), members_(std::move(members)), boxes_(members_.size()), left_(members_.size()) {}

void LocalMailboxes::send(int from, int to, std::string_view bytes) {
  CERTKV_EXPECT(to >= 0 && to < size(), InvalidArgument, "send: no rank {} in a channel of {}", to,
                size());
  CERTKV_EXPECT(bytes.size() <= kMaxMessageBytes, InvalidArgument,
                "send: {} bytes; a message has at most {}", bytes.size(), kMaxMessageBytes);
  life_.throw_if_broken();
  life_.alive(members_[size_t(from)]);
  {
    const std::lock_guard lock(mutex_);
    boxes_[size_t(to)].push_back({from, std::string(bytes)});
  }
  changed_.notify_all();
}

std::optional<Message> LocalMailboxes::try_receive(int rank) {
  life_.throw_if_broken();
  life_.alive(members_[size_t(rank)]);
  const std::lock_guard lock(mutex_);
  std::deque<Message>& box = boxes_[size_t(rank)];
  if (box.empty()) return std::nullopt;
  Message message = std::move(box.front());
  box.pop_front();
  return message;
}

Message LocalMailboxes::receive(int rank, int from, std::chrono::milliseconds silence) {
  CERTKV_EXPECT(from >= 0 && from < size(), InvalidArgument, "receive: no rank {} in a channel of {}",
                from, size());
  const SilenceWatch::Peer sender{members_[size_t(from)], false};
  SilenceWatch watch(life_, members_[size_t(rank)], silence, "receive");
  std::unique_lock lock(mutex_);
  std::deque<Message>& box = boxes_[size_t(rank)];
  while (true) {
    life_.throw_if_broken();
    const auto it = std::find_if(box.begin(), box.end(),
                                 [&](const Message& m) { return m.from == from; });
    if (it != box.end()) {
      Message message = std::move(*it);
      box.erase(it);
      return message;
    }
    try {
      CERTKV_EXPECT(!left_[size_t(from)], CommError, "receive: {} has left the channel",
                    life_.name(sender.rank));
      watch.check({&sender, 1}, {});
    } catch (const Error& error) {
      life_.break_with(error.kind(), error.what());
      throw;
    }
    changed_.wait_for(lock, SilenceWatch::kTick);
  }
}

void LocalMailboxes::leave(int rank) noexcept {
  {
    const std::lock_guard lock(mutex_);
    left_[size_t(rank)] = true;
  }
  changed_.notify_all();
}

namespace {

class LocalMessageChannel final : public MessageChannel {
 public:
  LocalMessageChannel(std::shared_ptr<LocalWorld> world, std::shared_ptr<LocalMailboxes> boxes,
                      int world_rank)
      : world_(std::move(world)), boxes_(std::move(boxes)) {
    const auto& members = boxes_->members();
    rank_ = int(std::find(members.begin(), members.end(), world_rank) - members.begin());
  }
  ~LocalMessageChannel() override { boxes_->leave(rank_); }

  int rank() const override { return rank_; }
  int size() const override { return boxes_->size(); }
  void send(int to, std::string_view bytes) override { boxes_->send(rank_, to, bytes); }
  std::optional<Message> try_receive() override { return boxes_->try_receive(rank_); }
  Message receive(int from, std::chrono::milliseconds silence) override {
    return boxes_->receive(rank_, from, silence);
  }
  void flush(std::chrono::milliseconds) override { world_->life().throw_if_broken(); }

 private:
  std::shared_ptr<LocalWorld> world_;
  std::shared_ptr<LocalMailboxes> boxes_;
  int rank_ = 0;
};

}  // namespace

std::unique_ptr<MessageChannel> make_local_message_channel(std::shared_ptr<LocalWorld> world,
                                                           std::shared_ptr<LocalMailboxes> boxes,
                                                           int world_rank) {
  return std::make_unique<LocalMessageChannel>(std::move(world), std::move(boxes), world_rank);
}

}  // namespace certkv
