#include "parallel/topology.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>

#include "kernels/base/error.h"
#include "parallel/communicator.h"

namespace certkv {
namespace {

std::string host_identity() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot_id;
  std::getline(file, boot_id);
  return "host:" + host_name() + ":" + boot_id.substr(0, 64);
}

std::vector<int> affinity_mask() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int c = 0; c < CPU_SETSIZE; ++c) {
      if (CPU_ISSET(c, &set)) cores.push_back(c);
    }
  }
  if (cores.empty()) cores.push_back(0);  // more cores than cpu_set_t holds, or no permission
  return cores;
}

// Whole cores of the control group's quota, 0 if there is none. /sys/fs/cgroup/cpu.max holds
// "max 100000" or "quota period" in microseconds.
int quota_cores() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  long period = 0;
  if (!(file >> quota >> period) || quota == "max" || !(period > 0)) return 0;
  const long microseconds = std::strtol(quota.c_str(), nullptr, 10);
  if (!(microseconds > 0)) return 0;
  return int(std::clamp(microseconds / period, 1L, 1L << 20));
}

// What each rank tells the others.
struct Card {
  char identity[192] = {};
  char host[192] = {};  // cores belong to the host, also where several nodes are played on it
  char name[64] = {};
  std::array<uint64_t, CPU_SETSIZE / 64> cores{};
  int64_t quota = 0;
};
static_assert(sizeof(Card) % 8 == 0);

Card own_card() {
  Card card;
  const std::string identity = node_identity();
  CERTKV_EXPECT(identity.size() < sizeof card.identity, InvalidArgument,
                "CERTKV_NODE has {} characters: at most {} are possible", identity.size(),
                sizeof card.identity - 1);
  std::memcpy(card.identity, identity.data(), identity.size());
  const std::string host = host_identity();
  std::memcpy(card.host, host.data(), std::min(host.size(), sizeof card.host - 1));
  const char* configured = std::getenv("CERTKV_NODE");
  const std::string name =
      (configured && *configured ? std::string(configured) : host_name()).substr(0, 63);
  std::memcpy(card.name, name.data(), name.size());
  for (int c : affinity_mask()) card.cores[size_t(c) / 64] |= uint64_t(1) << (c % 64);
  card.quota = quota_cores();
  return card;
}

}  // namespace

std::string host_name() {
  char name[256] = {};
  if (gethostname(name, sizeof name - 1) != 0) return "unknown-host";
  const std::string full(name);
  return full.substr(0, std::min<size_t>(full.find('.'), 63));
}

std::string node_identity() {
  const char* configured = std::getenv("CERTKV_NODE");
  return configured && *configured ? std::string("node:") + configured : host_identity();
}

int usable_cores() {
  const int cores = int(affinity_mask().size());
  const int quota = quota_cores();
  return quota > 0 ? std::min(cores, quota) : cores;
}

int fair_threads(const std::vector<std::vector<int>>& masks, int place, int quota) {
  std::map<int, int> users;  // of each core
  for (const auto& mask : masks) {
    for (int core : mask) ++users[core];
  }
  double share = 0;
  for (int core : masks[size_t(place)]) share += 1.0 / users[core];
  int threads = int(share + 1e-9);  // thirds of three cores make one
  if (quota > 0) threads = std::min(threads, quota / int(masks.size()));
  return std::max(1, threads);
}

Topology gather_topology(Communicator& group, std::chrono::milliseconds silence) {
  const Card own = own_card();
  std::vector<Card> cards(size_t(group.size()));
  cards[size_t(group.rank())] = own;
  group.all_gather({&cards[size_t(group.rank())], sizeof(Card), DType::U8, MemoryKind::Host},
                   {cards.data(), sizeof(Card) * cards.size(), DType::U8, MemoryKind::Host}, {});
  group.wait(silence);

  Topology topology;
  std::map<std::string, int> nodes;
  for (Card& card : cards) {
    card.identity[sizeof card.identity - 1] = 0;
    card.name[sizeof card.name - 1] = 0;
    const auto [it, is_new] = nodes.try_emplace(card.identity, int(nodes.size()));
    if (is_new) topology.node_names.push_back(card.name);
    topology.node_of_rank.push_back(it->second);
  }
  topology.nodes = int(nodes.size());
  topology.node = topology.node_of_rank[size_t(group.rank())];

  std::vector<std::vector<int>> masks;  // of the ranks on this host
  int place = 0;
  for (int r = 0; r < group.size(); ++r) {
    const bool on_node = topology.node_of_rank[size_t(r)] == topology.node;
    topology.local_rank += on_node && r < group.rank();
    topology.local_size += on_node && r != group.rank();
    if (std::memcmp(cards[size_t(r)].host, own.host, sizeof own.host) != 0) continue;
    if (r == group.rank()) place = int(masks.size());
    std::vector<int> mask;
    for (int c = 0; c < CPU_SETSIZE; ++c) {
      if (cards[size_t(r)].cores[size_t(c) / 64] >> (c % 64) & 1) mask.push_back(c);
    }
    masks.push_back(std::move(mask));
  }
  topology.threads = fair_threads(masks, place, int(own.quota));
  return topology;
}

}  // namespace certkv
