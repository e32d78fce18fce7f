// The holder's child: the process that talks to the network for it. When it ends, it is started
// again, after a pause that grows while it keeps ending soon after its start, and not for ever.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/asio.h"
#include "parallel/secure_session.h"

namespace certkv {

struct ServerChildOptions {
  std::vector<std::string> command;  // program and arguments; empty: there is no child
  std::optional<JobKey> key;         // handed over through descriptor kKeyFd
  std::chrono::milliseconds first_pause{100}, longest_pause{10000};
  std::chrono::milliseconds stable{1000};  // one that lived this long did not fail at its start
  int starts = 20;                         // in a row that failed at once: given up after these

  static constexpr int kKeyFd = 3;
};

// THREADS: the one that runs `io`.
class ServerChild {
 public:
  // `ended` is called after every end of the child.
  ServerChild(boost::asio::io_context& io, ServerChildOptions options, std::function<void()> ended);
  ~ServerChild();  // ends the child
  ServerChild(const ServerChild&) = delete;
  ServerChild& operator=(const ServerChild&) = delete;

  void start();
  void stop();                          // SIGTERM; no more starts
  int64_t pid() const { return pid_; }  // 0 while none runs
  std::string describe() const;         // JSON

 private:
  void launch();
  void watch();
  void take_end();
  void later();

  boost::asio::io_context& io_;
  const ServerChildOptions options_;
  const std::function<void()> ended_;
  boost::asio::posix::stream_descriptor handle_;  // of the process: readable at its end
  boost::asio::steady_timer timer_;
  int64_t pid_ = 0;
  uint64_t restarts_ = 0;
  int failures_ = 0;  // in a row
  bool stopping_ = false, given_up_ = false;
  std::string last_end_;
  std::chrono::steady_clock::time_point started_;
};

}  // namespace certkv
