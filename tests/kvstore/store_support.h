// What the store's tests share: a holder in a thread, and blocks with known contents.
#pragma once

#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kvstore/client.h"
#include "kvstore/control.h"
#include "kvstore/holder.h"

namespace certkv::test {

inline constexpr std::chrono::milliseconds kPatience{10000};

inline Deadline patience() {
  return Deadline::after(kPatience);
}

// Waits until `condition` holds; false after kPatience.
template <typename Condition>
bool eventually(Condition condition) {
  const Deadline deadline = patience();
  while (!condition()) {
    if (deadline.passed()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

// Of a holder that ends with its test alone, however long nobody is attached meanwhile.
inline HolderOptions ended_by_the_test() {
  HolderOptions o;
  o.linger = o.attach_within = std::chrono::milliseconds(-1);
  return o;
}

// A holder that runs in a thread of this process.
class ThreadHolder {
 public:
  explicit ThreadHolder(uint64_t arena_bytes = uint64_t(4) << 20, HolderOptions options = {})
      : nonce_(random_u64() | 1),
        holder_(std::make_unique<Holder>(Arena::create(arena_bytes, nonce_), nonce_, options)),
        thread_([this] { why_ = holder_->run(); }) {}
  ~ThreadHolder() { stop(); }

  const std::string& socket() const { return holder_->socket(); }
  uint64_t nonce() const { return nonce_; }
  void stop() {
    if (!thread_.joinable()) return;
    holder_->stop();
    thread_.join();
  }
  // Waits for it to end by itself; says why it did.
  std::string join() {
    thread_.join();
    return why_;
  }

  std::shared_ptr<StoreClient> attach(int rank = 0) const {
    StoreClientOptions o;
    o.socket = socket();
    o.rank = rank;
    return StoreClient::attach(o, patience());
  }

 private:
  uint64_t nonce_;
  std::unique_ptr<Holder> holder_;
  std::string why_;
  std::thread thread_;
};

inline BlockShape small_shape() {
  return {DType::BF16, 16, 64};
}

// Rows that only this (layer, head, block, tensor) has.
inline std::vector<uint16_t> known_rows(const BlockShape& shape, uint32_t layer, uint32_t head,
                                        uint32_t block, bool values) {
  std::mt19937 random(layer * 7919u + head * 104729u + block * 1299709u + (values ? 1 : 0));
  std::vector<uint16_t> rows(shape.elements());
  for (auto& x : rows) x = uint16_t(random());
  return rows;
}

inline void seal_known(OriginalsSpan& span, uint32_t layer, uint32_t head, uint32_t block) {
  const BlockShape& shape = span.request().shape;
  span.seal_block(layer, head, block, known_rows(shape, layer, head, block, false).data(),
                  known_rows(shape, layer, head, block, true).data());
}

// Reads one block by copy; contents land in k and v.
struct Copied {
  std::vector<uint16_t> k, v;
  BlockResult result;
};
inline Copied read_copy(BlockReader& reader, const BlockId& id, const BlockShape& shape,
                        BlockPart part = BlockPart::Both) {
  Copied c;
  c.k.resize(shape.elements());
  c.v.resize(shape.elements());
  const Destination d{part, false, c.k.data(), c.v.data()};
  ReadTicket ticket = reader.read({&id, 1}, {&d, 1}, patience());
  c.result = BlockReader::wait(ticket)[0];
  return c;
}

}  // namespace certkv::test
