// Which ranks of a job form a tensor-parallel group, and which replica they are.
//
// `parallel: {tensor: T, data: D}`: the world has T * D ranks; replica d is ranks [d*T, (d+1)*T),
// its leader is rank d*T. Rank 0 leads replica 0 and the job.
#pragma once

#include <vector>

namespace certkv {

struct RankLayout {
  int tensor = 1;
  int data = 1;

  int world() const { return tensor * data; }
  int replica(int rank) const { return rank / tensor; }
  int tensor_rank(int rank) const { return rank % tensor; }
  int leader(int replica) const { return replica * tensor; }
  bool is_leader(int rank) const { return tensor_rank(rank) == 0; }
  std::vector<int> members(int replica) const;  // [tensor], ascending
  std::vector<int> leaders() const;             // [data], ascending
};

// tensor 0 stands for world / data. InvalidArgument, with the keys, the values and what would fit,
// unless tensor * data == world.
RankLayout plan_ranks(int tensor, int data, int world);

}  // namespace certkv
