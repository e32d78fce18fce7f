#include "kvstore/cluster/nodes.h"

#include <xxhash.h>

#include <algorithm>
#include <set>

#include "kernels/base/error.h"

namespace certkv::cluster {

void check_seeds(const Seeds& seeds) {
  CERTKV_EXPECT(!seeds.empty() && seeds.size() <= kMaxNodes, InvalidArgument,
                "{} seeds: a cluster has 1 .. {} nodes", seeds.size(), kMaxNodes);
  std::set<std::string> names;
  for (const Seed& s : seeds) {
    const bool printable =
        std::all_of(s.name.begin(), s.name.end(), [](char c) { return c > ' ' && c < '\x7f'; });
    CERTKV_EXPECT(!s.name.empty() && s.name.size() <= kMaxNodeName && printable, InvalidArgument,
                  "seed '{}': a node's name has 1 .. {} printable ASCII characters", s.name,
                  kMaxNodeName);
    CERTKV_EXPECT(names.insert(s.name).second, InvalidArgument,
                  "seed '{}' stands twice in the seed list: give each node a name of its own",
                  s.name);
  }
}

uint64_t seeds_digest(const Seeds& seeds) {
  std::string all;
  for (const Seed& s : seeds) all += s.name + '\n';
  return XXH3_64bits(all.data(), all.size());
}

}  // namespace certkv::cluster
