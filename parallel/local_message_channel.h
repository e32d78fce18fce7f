// Messages between thread ranks.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "parallel/liveness.h"
#include "parallel/message_channel.h"

namespace certkv {

class LocalWorld;

// What the members of one channel share: a box per receiver. THREADS: any.
class LocalMailboxes {
 public:
  LocalMailboxes(LifeTable& life, std::vector<int> members);

  int size() const { return int(members_.size()); }
  const std::vector<int>& members() const { return members_; }

  void send(int from, int to, std::string_view bytes);
  std::optional<Message> try_receive(int rank);
  Message receive(int rank, int from, std::chrono::milliseconds silence);
  void leave(int rank) noexcept;

 private:
  LifeTable& life_;
  std::vector<int> members_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::deque<Message>> boxes_;
  std::vector<bool> left_;
};

std::unique_ptr<MessageChannel> make_local_message_channel(std::shared_ptr<LocalWorld> world,
                                                           std::shared_ptr<LocalMailboxes> boxes,
                                                           int world_rank);

}  // namespace certkv
