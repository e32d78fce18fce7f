#include "kvstore/reader.h"

#include "kernels/base/error.h"
#include "kvstore/reader_batch.h"

namespace certkv {

const char* block_status_name(BlockStatus status) {
  switch (status) {
    case BlockStatus::Pending:
      return "pending";
    case BlockStatus::Ok:
      return "ok";
    case BlockStatus::Absent:
      return "absent";
    case BlockStatus::Corrupt:
      return "corrupt";
    case BlockStatus::Lost:
      return "lost";
  }
  return "unknown";
}

ReadSummary summarize(std::span<const BlockResult> results) {
  ReadSummary s;
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i].status == BlockStatus::Ok) continue;
    if (s.failed++ == 0) s.first = i;
  }
  return s;
}

void check_destinations(std::span<const BlockId> ids, std::span<const Destination> destinations,
                        bool shows_views) {
  CERTKV_EXPECT(ids.size() == destinations.size(), InvalidArgument,
                "{} block ids, but {} destinations", ids.size(), destinations.size());
  for (size_t i = 0; i < destinations.size(); ++i) {
    const Destination& d = destinations[i];
    CERTKV_EXPECT(d.part == BlockPart::K || d.part == BlockPart::V || d.part == BlockPart::Both,
                  InvalidArgument, "destination {} asks for part {}: K, V or both are known", i,
                  int(d.part));
    if (d.view && shows_views) continue;
    CERTKV_EXPECT((!wants_k(d.part) || d.k != nullptr) && (!wants_v(d.part) || d.v != nullptr),
                  InvalidArgument, "destination {} has no buffer for a part that it asks for", i);
  }
}

}  // namespace certkv
