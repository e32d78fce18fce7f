// Readers that wrap a reader: one injects faults, one counts. The readers themselves know of
// neither.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>

#include "kvstore/reader.h"

namespace certkv {

// Shares of the blocks that meet each fault, drawn one after the other in this order. The draws
// depend on the seed and on the order of the calls alone.
struct ReaderFaults {
  uint64_t seed = 1;
  double absent = 0;
  double lost = 0;
  double corrupt = 0;  // one random bit of the fetched payload is flipped before it is verified
  double delayed = 0;  // of the batches: decided only `delay` after the call
  std::chrono::milliseconds delay{50};
};

// Blocks that meet no fault pass unchanged. A corrupt block is fetched, a bit of it is flipped, and
// it is then verified against its sealed digest as a reader does after a transfer: should the
// digest miss the flip, the block is delivered as Ok, flip and all, and whoever compares contents
// sees it. Views of corrupt blocks are never changed in place: a private copy is.
class FaultInjectingReader : public BlockReader {
 public:
  FaultInjectingReader(std::shared_ptr<BlockReader> inner, BlockShape shape,
                       const ReaderFaults& faults);
  ReadTicket read(std::span<const BlockId> ids, std::span<const Destination> destinations,
                  Deadline deadline) override;

  // Changes the shares from now on; the generator goes on. THREADS: safe.
  void set(const ReaderFaults& faults);
  uint64_t injected() const { return injected_.load(std::memory_order_relaxed); }

 private:
  std::shared_ptr<BlockReader> inner_;
  BlockShape shape_;
  std::mutex mutex_;
  ReaderFaults faults_;
  std::mt19937_64 random_;
  std::atomic<uint64_t> injected_{0};
};

struct ReaderStatistics {
  uint64_t batches = 0, blocks = 0;
  uint64_t ok = 0, absent = 0, corrupt = 0, lost = 0;
  uint64_t copied_bytes = 0;  // payload of blocks that are Ok
  uint64_t viewed_bytes = 0;
  uint64_t microseconds = 0;  // from the call to the end of wait(), summed over batches
};

// Counts a batch when it is waited for, or dropped undecided.
class StatisticsReader : public BlockReader {
 public:
  StatisticsReader(std::shared_ptr<BlockReader> inner, BlockShape shape)
      : inner_(std::move(inner)), shape_(shape), totals_(std::make_shared<Totals>()) {}
  ReadTicket read(std::span<const BlockId> ids, std::span<const Destination> destinations,
                  Deadline deadline) override;
  ReaderStatistics statistics() const;  // THREADS: safe

 private:
  struct Totals {
    std::mutex mutex;
    ReaderStatistics sum;
  };
  class Batch;
  std::shared_ptr<BlockReader> inner_;
  BlockShape shape_;
  std::shared_ptr<Totals> totals_;
};

}  // namespace certkv
