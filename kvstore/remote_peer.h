// The way to one other store: a connection that is made when it is needed and again after it was
// lost, with pauses and a budget, so that a store in trouble is not stormed by those who need it.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "kernels/base/deadline.h"
#include "parallel/transport.h"

namespace certkv {

struct RetryPolicy {
  // Every success earns `earned` of a retry, up to `most`; every retry costs one. So in the long
  // run at most one request in ten is a repetition.
  double most = 10;
  double earned = 0.1;
  std::chrono::milliseconds first_pause{20};  // doubled with every failure in a row
  std::chrono::milliseconds longest_pause{2000};
  std::chrono::milliseconds connect{1000};  // longest wait for a connection
};

// THREADS: safe.
class RemotePeer {
 public:
  RemotePeer(std::shared_ptr<Transport> transport, std::string address, RetryPolicy policy = {});

  const std::string& address() const { return address_; }
  Transport& transport() { return *transport_; }

  // A connection, an old or a new one; nothing where none can be had before the deadline or in this
  // pause after a failure. Never throws what is the peer's fault.
  std::optional<PeerId> connection(Deadline deadline);
  std::string last_error() const;

  void succeeded();
  // Takes a retry from the budget; false: there is none, give up.
  bool may_retry();

 private:
  const std::shared_ptr<Transport> transport_;
  const std::string address_;
  const RetryPolicy policy_;
  std::mutex connecting_;     // one at a time
  mutable std::mutex mutex_;  // guards everything below
  std::optional<PeerId> peer_;
  std::string error_;
  int failures_ = 0;  // in a row
  double budget_;
  Deadline::Clock::time_point not_before_{};
};

}  // namespace certkv
