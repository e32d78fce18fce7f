// What the transports share: the state of a call, and the threads that run the handler.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "parallel/transport.h"

namespace certkv {

// Shared by the caller and the transport. It ends once; whoever comes later changes nothing.
struct CallState {
  CallState(Deadline d, Window w) : deadline(d), window(std::move(w)) {}

  // True for the first.
  bool end(CallStatus with, size_t reply_bytes, const std::string& text);

  const Deadline deadline;
  // Of the reply. Written by the transport while the call is pending, by nobody afterwards save
  // that a reply which comes too late may still arrive in it: the transport keeps this state alive
  // until then.
  const Window window;
  std::mutex mutex;
  std::condition_variable ended;
  CallStatus status = CallStatus::Pending;
  size_t bytes = 0;
  std::string why;
};

// A request on its way through the handler.
struct HandlerTask {
  PeerId from;
  uint64_t call = 0;  // the caller's number of it
  uint32_t op = 0;
  std::span<const std::byte> body;
  Window window;                 // that holds the body, or
  std::vector<std::byte> bytes;  // this does
  size_t reply_limit = 0;
  Deadline deadline = Deadline::never();
  // Called from a handler thread, once.
  std::function<void(CallStatus status, Window reply, size_t bytes)> answer;
};

// The reply's body of a refusal is its text.
inline constexpr size_t kMaxRefusalBytes = 512;

class HandlerPool {
 public:
  HandlerPool(TransportHandler handler, WindowPool pool, const TransportLimits& limits);
  ~HandlerPool();  // waits for the handlers that run; drops what is queued

  // False where too many wait already.
  bool add(HandlerTask task);

 private:
  void run();
  void answer(HandlerTask& task);
  void refuse(HandlerTask& task, CallStatus status, const std::string& text);

  TransportHandler handler_;
  WindowPool pool_;
  size_t limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<HandlerTask> queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// Throws InvalidArgument where limits or times make no sense together.
void check_transport_options(const TransportOptions& options);

// Checks a call's sizes and takes its windows: the request, filled with `parts`, and the state with
// the reply's. Throws InvalidArgument and OutOfMemory.
struct PreparedCall {
  Window request;
  std::shared_ptr<CallState> state;
};
PreparedCall prepare_call(const WindowPool& pool, const TransportLimits& limits,
                          std::span<const std::span<const std::byte>> parts, size_t reply_bytes,
                          Deadline deadline);

// "host:port", "[v6]:port". Throws InvalidArgument.
std::pair<std::string, uint16_t> split_address(const std::string& address);

}  // namespace certkv
