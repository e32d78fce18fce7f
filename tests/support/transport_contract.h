// What every transport keeps to: one suite, instantiated per transport. The side that is called is
// a server of its own, for networks a process of its own, so that it can be killed and stopped.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "parallel/transport.h"

namespace certkv::test {

// What the server of a test answers, by op.
enum ContractOp : uint32_t {
  kEcho = 1,
  kSleep = 2,  // body: milliseconds, u32; then an echo of them
  kThrow = 3,  // throws InvalidArgument "refused on purpose"
  kFill = 4,   // body: bytes u64, seed u64: a reply of that many bytes, fill_pattern()
  kCount = 5,  // how many requests have been answered so far, u64
};
// `stop` ends its sleeps.
TransportHandler contract_handler(std::shared_ptr<std::atomic<bool>> stop = {});
void fill_pattern(std::span<std::byte> out, uint64_t seed);

// Limits small enough to be met: requests 1 MiB, replies 2 MiB.
TransportOptions contract_options();

// A server with contract_handler() and what can befall it.
class ContractServer {
 public:
  virtual ~ContractServer() = default;
  virtual std::string address() const = 0;
  virtual void kill() = 0;
  virtual void pause() = 0;
  virtual void resume() = 0;
};

struct TransportKind {
  const char* name;
  // A world for one test; its transports and servers share what they need to share.
  struct World {
    virtual ~World() = default;
    virtual std::unique_ptr<Transport> client(const TransportOptions& options, bool wrong_key) = 0;
    virtual std::unique_ptr<ContractServer> server() = 0;
  };
  std::unique_ptr<World> (*make)();
};

class TransportContract : public testing::TestWithParam<TransportKind> {};

}  // namespace certkv::test
