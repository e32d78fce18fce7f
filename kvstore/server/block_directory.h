// Which blocks lie in this node's arena, as its holder accounts for them: those that its ranks
// sealed, and the copies of others' that its server took in.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kvstore/client.h"
#include "kvstore/span_directory.h"

namespace certkv {

// The owner under which a copy of a run (one layer and KV head of a reservation) is reserved: a
// name that follows from the run's identity (`block` does not count), so that a restarted server
// finds and adopts it. SOURCE: FORMAT.md, Replicas.
OwnerId replica_owner(const BlockId& run);

class BlockDirectory {
 public:
  // `least` lies between two questions to the holder because of a miss.
  explicit BlockDirectory(std::shared_ptr<StoreClient> client,
                          std::chrono::milliseconds least = std::chrono::milliseconds(20));

  // Where the block is: of several records that name it (the rest of a copy that a dead server left
  // half-filled lies elsewhere) the one whose slot holds it, else any, else nothing. Asks the
  // holder again where none holds it, but not too often. The record stays valid while it is held;
  // the bytes it leads to may be anybody's by then, and are checked. THREADS: safe.
  std::shared_ptr<const SpanRecord> find(const BlockId& id);

  struct Held {
    std::shared_ptr<const SpanRecord> record;
    ListedReservation listed;
    bool replica = false;
  };
  // What is there now. Throws as StoreClient::list.
  std::vector<Held> refresh();

 private:
  using Index = std::unordered_map<uint64_t, std::vector<std::shared_ptr<const SpanRecord>>>;
  struct Found {
    std::shared_ptr<const SpanRecord> record;
    bool holds = false;
  };
  Found look_up(const Index& index, const BlockId& id) const;
  Held held_of(ListedReservation listed) const;

  const std::shared_ptr<StoreClient> client_;
  const std::chrono::milliseconds least_;
  std::mutex mutex_;   // guards index_
  std::mutex asking_;  // one question at a time; guards what follows
  std::shared_ptr<const Index> index_;
  std::unordered_map<uint32_t, Held> known_;  // by version
  Deadline::Clock::time_point asked_{};
};

}  // namespace certkv
