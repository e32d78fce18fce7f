#include "kvstore/remote_peer.h"

#include <algorithm>
#include <thread>

#include "kernels/base/error.h"
#include "kernels/base/log.h"

namespace certkv {

using Clock = Deadline::Clock;

RemotePeer::RemotePeer(std::shared_ptr<Transport> transport, std::string address,
                       RetryPolicy policy)
    : transport_(std::move(transport)),
      address_(std::move(address)),
      policy_(policy),
      budget_(policy.most) {}

std::optional<PeerId> RemotePeer::connection(Deadline deadline) {
  const auto standing = [&]() -> std::optional<PeerId> {
    const std::lock_guard lock(mutex_);
    return peer_ && transport_->alive(*peer_) ? peer_ : std::nullopt;
  };
  if (const auto peer = standing()) return peer;
  const std::lock_guard one(connecting_);
  if (const auto peer = standing()) return peer;  // another thread made it
  {
    const std::lock_guard lock(mutex_);
    if (peer_ && error_.empty()) error_ = transport_->why_lost(*peer_);
    if (Clock::now() < not_before_) return std::nullopt;
  }
  if (deadline.passed()) return std::nullopt;
  try {
    const auto limit = Deadline::after(policy_.connect);
    const PeerId peer =
        transport_->connect(address_, limit.at() < deadline.at() ? limit : deadline);
    const std::lock_guard lock(mutex_);
    if (failures_ > 0) log_info("the store at {} is reached again", address_);
    failures_ = 0;
    error_.clear();
    return peer_ = peer;
  } catch (const Error& e) {
    if (e.kind() == ErrorKind::InvalidArgument) throw;  // the address is no address
    const std::lock_guard lock(mutex_);
    if (failures_++ == 0) log_warning("the store at {} is not reached: {}", address_, e.what());
    error_ = e.what();
    const auto pause = policy_.first_pause * (1 << std::min(failures_ - 1, 16));
    not_before_ = Clock::now() + std::min<std::chrono::milliseconds>(pause, policy_.longest_pause);
    return std::nullopt;
  }
}

std::string RemotePeer::last_error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

void RemotePeer::succeeded() {
  const std::lock_guard lock(mutex_);
  budget_ = std::min(budget_ + policy_.earned, policy_.most);
}

bool RemotePeer::may_retry() {
  const std::lock_guard lock(mutex_);
  if (budget_ < 1) return false;
  budget_ -= 1;
  return true;
}

}  // namespace certkv
