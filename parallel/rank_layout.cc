#include "parallel/rank_layout.h"

#include <cstdint>

#include "kernels/base/error.h"

namespace certkv {

std::vector<int> RankLayout::members(int replica) const {
  std::vector<int> ranks;
  for (int t = 0; t < tensor; ++t) ranks.push_back(leader(replica) + t);
  return ranks;
}

std::vector<int> RankLayout::leaders() const {
  std::vector<int> ranks;
  for (int d = 0; d < data; ++d) ranks.push_back(leader(d));
  return ranks;
}

RankLayout plan_ranks(int tensor, int data, int world) {
  CERTKV_EXPECT(world >= 1, InvalidArgument, "a job of {} ranks", world);
  CERTKV_EXPECT(tensor >= 0, InvalidArgument,
                "parallel.tensor is {}: it must be 1 or more, or 0 for ranks / parallel.data", tensor);
  CERTKV_EXPECT(data >= 1, InvalidArgument, "parallel.data is {}: it must be 1 or more", data);
  if (tensor == 0) {
    CERTKV_EXPECT(world % data == 0, InvalidArgument,
                  "parallel.data is {}, which does not divide the {} ranks of this job: start a "
                  "multiple of {} ranks (mpirun -np) or change parallel.data",
                  data, world, data);
    tensor = world / data;
  }
  const int64_t needed = int64_t(tensor) * data;
  if (needed != world) {
    CERTKV_EXPECT(world % tensor != 0, InvalidArgument,
                  "parallel.tensor {} times parallel.data {} needs {} ranks, this job has {}: start "
                  "{} (mpirun -np {}) or set parallel.data to {}",
                  tensor, data, needed, world, needed, needed, world / tensor);
    CERTKV_THROW(InvalidArgument,
                 "parallel.tensor {} times parallel.data {} needs {} ranks, this job has {}: start "
                 "{} (mpirun -np {}) or change the two keys",
                 tensor, data, needed, world, needed, needed);
  }
  return {tensor, data};
}

}  // namespace certkv
