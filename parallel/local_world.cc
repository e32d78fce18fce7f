#include "parallel/local_world.h"

#include <algorithm>
#include <string>

#include "parallel/local_communicator.h"
#include "parallel/local_message_channel.h"
#include "parallel/topology.h"

namespace certkv {
namespace {

std::vector<std::string> names_of_threads(int ranks) {
  CERTKV_EXPECT(ranks >= 1 && ranks <= 1024, InvalidArgument,
                "{} thread ranks: between 1 and 1024 are possible", ranks);
  std::vector<std::string> names;
  for (int r = 0; r < ranks; ++r) names.push_back(fmt::format("rank {} ({})", r, host_name()));
  return names;
}

}  // namespace

LocalWorld::LocalWorld(int ranks) : life_(names_of_threads(ranks)) {}

std::shared_ptr<LocalWorld> LocalWorld::create(int ranks) {
  return std::shared_ptr<LocalWorld>(new LocalWorld(ranks));
}

std::vector<int> LocalWorld::checked_members(int rank, std::vector<int> members) const {
  if (members.empty()) {
    for (int r = 0; r < size(); ++r) members.push_back(r);
  }
  std::vector<int> sorted = members;
  std::sort(sorted.begin(), sorted.end());
  CERTKV_EXPECT(sorted.front() >= 0 && sorted.back() < size() &&
                    std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
                InvalidArgument, "a group must name different ranks of the {} there are", size());
  CERTKV_EXPECT(std::binary_search(sorted.begin(), sorted.end(), rank), InvalidArgument,
                "rank {} joins a group that it is not a member of", rank);
  return members;
}

template <typename Shared>
std::shared_ptr<Shared> LocalWorld::Registry<Shared>::join(int rank,
                                                           const std::vector<int>& members,
                                                           LocalWorld& world) {
  const int call = calls[{rank, members}]++;
  std::shared_ptr<Shared>& group = groups[{call, members}];
  if (!group) group = std::make_shared<Shared>(world.life(), members);
  return group;
}

std::unique_ptr<Communicator> LocalWorld::communicator(int rank, std::vector<int> members) {
  members = checked_members(rank, std::move(members));
  const std::lock_guard lock(mutex_);
  return make_local_communicator(shared_from_this(), groups_.join(rank, members, *this), rank);
}

std::unique_ptr<MessageChannel> LocalWorld::channel(int rank, std::vector<int> members) {
  members = checked_members(rank, std::move(members));
  const std::lock_guard lock(mutex_);
  return make_local_message_channel(shared_from_this(), mailboxes_.join(rank, members, *this), rank);
}

void LocalWorld::abort(int rank, std::string_view reason) noexcept {
  life_.break_with(ErrorKind::CommError, fmt::format("{} gave up: {}", life_.name(rank), reason));
}

}  // namespace certkv
