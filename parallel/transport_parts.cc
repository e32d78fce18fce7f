#include "parallel/transport_parts.h"

#include <charconv>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/base/log.h"

namespace certkv {

const char* call_status_name(CallStatus status) {
  switch (status) {
    case CallStatus::Pending:
      return "pending";
    case CallStatus::Ok:
      return "ok";
    case CallStatus::Refused:
      return "refused";
    case CallStatus::Busy:
      return "busy";
    case CallStatus::TooLarge:
      return "reply too large";
    case CallStatus::Deadline:
      return "deadline passed";
    case CallStatus::PeerLost:
      return "peer lost";
    case CallStatus::Cancelled:
      return "cancelled";
  }
  return "unknown";
}

// ---- calls --------------------------------------------------------------------------------------

bool CallState::end(CallStatus with, size_t reply_bytes, const std::string& text) {
  const std::lock_guard lock(mutex);
  if (status != CallStatus::Pending) return false;
  status = with;
  bytes = reply_bytes;
  why = text;
  ended.notify_all();
  return true;
}

TransportCall& TransportCall::operator=(TransportCall&& other) noexcept {
  if (this != &other) {
    cancel();
    state_ = std::move(other.state_);
  }
  return *this;
}

CallStatus TransportCall::poll() {
  {
    const std::lock_guard lock(state_->mutex);
    if (state_->status != CallStatus::Pending) return state_->status;
  }
  if (state_->deadline.passed()) {
    state_->end(CallStatus::Deadline, 0, "no answer before the deadline");
  }
  const std::lock_guard lock(state_->mutex);
  return state_->status;
}

CallStatus TransportCall::wait() {
  {
    std::unique_lock lock(state_->mutex);
    const auto done = [&] { return state_->status != CallStatus::Pending; };
    if (state_->deadline.at() == Deadline::Clock::time_point::max()) {
      state_->ended.wait(lock, done);
    } else {
      state_->ended.wait_until(lock, state_->deadline.at(), done);
    }
  }
  return poll();
}

void TransportCall::cancel() noexcept {
  if (state_ != nullptr) state_->end(CallStatus::Cancelled, 0, "cancelled");
}

std::span<const std::byte> TransportCall::reply() const {
  const std::lock_guard lock(state_->mutex);
  return state_->window.bytes().first(state_->bytes);
}

std::string TransportCall::why() const {
  const std::lock_guard lock(state_->mutex);
  return state_->why;
}

PreparedCall prepare_call(const WindowPool& pool, const TransportLimits& limits,
                          std::span<const std::span<const std::byte>> parts, size_t reply_bytes,
                          Deadline deadline) {
  size_t bytes = 0;
  for (const auto& part : parts) {
    CERTKV_EXPECT(part.size() <= limits.request_bytes - bytes, InvalidArgument,
                  "a request of more than {} bytes: send it in parts", limits.request_bytes);
    bytes += part.size();
  }
  CERTKV_EXPECT(reply_bytes <= limits.reply_bytes, InvalidArgument,
                "a reply of {} bytes was asked for: the most is {}", reply_bytes,
                limits.reply_bytes);
  PreparedCall call;
  call.request = pool.take(bytes);
  Window reply = pool.take(reply_bytes);
  CERTKV_EXPECT(call.request && reply, OutOfMemory,
                "no window for a request of {} and a reply of {} bytes: {} of {} are lent; have "
                "fewer calls under way",
                bytes, reply_bytes, pool.lent_bytes(), pool.slab().size());
  std::byte* to = call.request.bytes().data();
  for (const auto& part : parts) {
    if (!part.empty()) std::memcpy(to, part.data(), part.size());
    to += part.size();
  }
  call.state = std::make_shared<CallState>(deadline, std::move(reply));
  return call;
}

// ---- handlers -----------------------------------------------------------------------------------

std::span<std::byte> TransportReply::reserve(size_t bytes) {
  too_large_ = bytes > limit_;
  CERTKV_EXPECT(!too_large_, InvalidArgument, "a reply of {} bytes: the caller takes {}", bytes,
                limit_);
  window_.reset();
  while (!(window_ = pool_.take(bytes))) {
    CERTKV_EXPECT(!deadline_.passed(), OutOfMemory, "no window for a reply of {} bytes", bytes);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  bytes_ = bytes;
  return window_.bytes();
}

void TransportReply::shrink(size_t bytes) {
  CERTKV_EXPECT(bytes <= bytes_, InvalidArgument, "a reply of {} bytes grown to {}", bytes_, bytes);
  bytes_ = bytes;
}

HandlerPool::HandlerPool(TransportHandler handler, WindowPool pool, const TransportLimits& limits)
    : handler_(std::move(handler)), pool_(std::move(pool)), limit_(limits.queued) {
  for (size_t i = 0; i < limits.handler_threads; ++i) {
    threads_.emplace_back([this] { run(); });
  }
}

HandlerPool::~HandlerPool() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  for (auto& t : threads_) t.join();
}

bool HandlerPool::add(HandlerTask task) {
  {
    const std::lock_guard lock(mutex_);
    if (stop_ || queue_.size() >= limit_) return false;
    queue_.push_back(std::move(task));
  }
  changed_.notify_one();
  return true;
}

void HandlerPool::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    HandlerTask task = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    answer(task);
    task = {};
    lock.lock();
  }
}

void HandlerPool::refuse(HandlerTask& task, CallStatus status, const std::string& text) {
  const size_t bytes = std::min({text.size(), kMaxRefusalBytes, task.reply_limit});
  Window w = pool_.take(bytes);
  if (w && bytes > 0) std::memcpy(w.bytes().data(), text.data(), bytes);
  const size_t sent = w ? bytes : 0;
  task.answer(status, std::move(w), sent);
}

void HandlerPool::answer(HandlerTask& task) {
  if (task.deadline.passed()) return refuse(task, CallStatus::Busy, "it waited past its deadline");
  TransportReply reply(pool_, task.reply_limit, task.deadline);
  try {
    handler_({task.from, task.op, task.body, task.deadline}, reply);
  } catch (const std::exception& e) {
    const auto* error = dynamic_cast<const Error*>(&e);
    const bool busy = error != nullptr && error->kind() == ErrorKind::OutOfMemory;
    return refuse(task,
                  reply.too_large_ ? CallStatus::TooLarge
                  : busy           ? CallStatus::Busy
                                   : CallStatus::Refused,
                  e.what());
  }
  task.answer(CallStatus::Ok, std::move(reply.window_), reply.bytes_);
}

// ---- options ------------------------------------------------------------------------------------

void check_transport_options(const TransportOptions& o) {
  CERTKV_EXPECT(o.heartbeat.count() > 0 && o.silence >= 2 * o.heartbeat, InvalidArgument,
                "transport: a heartbeat every {} ms and silence of {} ms: the silence must be at "
                "least two heartbeats",
                o.heartbeat.count(), o.silence.count());
  const TransportLimits& l = o.limits;
  CERTKV_EXPECT(l.request_bytes >= 4096 && l.reply_bytes >= 4096 && l.handler_threads >= 1 &&
                    l.connections >= 1 && l.strangers >= 1 && l.calls >= 1 && l.queued >= 1 &&
                    l.window_bytes >= l.request_bytes + l.reply_bytes,
                InvalidArgument,
                "transport: windows of {} bytes hold no request of {} and reply of {}, or another "
                "limit is 0",
                l.window_bytes, l.request_bytes, l.reply_bytes);
}

std::pair<std::string, uint16_t> split_address(const std::string& address) {
  const size_t colon = address.rfind(':');
  std::string host = address.substr(0, colon == address.npos ? 0 : colon);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  uint32_t port = 0;
  const char* digits = address.data() + (colon == address.npos ? address.size() : colon + 1);
  const char* end = address.data() + address.size();
  const auto [at, error] = std::from_chars(digits, end, port);
  CERTKV_EXPECT(!host.empty() && error == std::errc() && at == end && port <= 65535,
                InvalidArgument, "network address '{}': host:port is needed, such as 10.0.0.1:7000",
                address.substr(0, 256));
  return {host, uint16_t(port)};
}

}  // namespace certkv
