// Ranks as threads of one process: what they share, and where their groups and channels come from.
//
// Used by tests of everything that is parallel, and by single-process runs (one rank).
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/liveness.h"
#include "parallel/message_channel.h"

namespace certkv {

class LocalGroup;
class LocalMailboxes;

// THREADS: all members may be called from any thread.
class LocalWorld : public std::enable_shared_from_this<LocalWorld> {
 public:
  static std::shared_ptr<LocalWorld> create(int ranks);  // REQUIRES 1 <= ranks <= 1024

  int size() const { return life_.ranks(); }
  LifeTable& life() { return life_; }

  // This rank's member of a group. Every member calls it with the same list of ranks in the same
  // order; the n-th calls of the members with one list belong together. Empty: all ranks.
  // InvalidArgument unless `rank` is in the list and the list has no rank twice.
  std::unique_ptr<Communicator> communicator(int rank, std::vector<int> members = {});
  std::unique_ptr<MessageChannel> channel(int rank, std::vector<int> members = {});

  // Breaks every group of the world: waiting ranks get CommError with this rank's name.
  void abort(int rank, std::string_view reason) noexcept;

 private:
  explicit LocalWorld(int ranks);
  template <typename Shared>
  struct Registry {
    std::map<std::pair<int, std::vector<int>>, int> calls;  // by rank and members
    std::map<std::pair<int, std::vector<int>>, std::shared_ptr<Shared>> groups;  // by call and members
    std::shared_ptr<Shared> join(int rank, const std::vector<int>& members, LocalWorld& world);
  };
  std::vector<int> checked_members(int rank, std::vector<int> members) const;

  LifeTable life_;
  std::mutex mutex_;
  Registry<LocalGroup> groups_;
  Registry<LocalMailboxes> mailboxes_;
};

}  // namespace certkv
