#include "runtime/signals.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>

#include "kernels/base/error.h"
#include "kernels/base/log.h"

namespace certkv {
namespace {

constexpr int kStopSignals[] = {SIGINT, SIGTERM, SIGUSR1};

// What the handler touches: lock-free atomics and a descriptor, nothing else.
std::atomic<int> first_signal{0};
std::atomic<int64_t> first_nanoseconds{0};
std::atomic<int> wake_fd{-1};
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);

int64_t now_nanoseconds() {
  struct timespec t {};
  ::clock_gettime(CLOCK_MONOTONIC, &t);  // async-signal-safe
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

extern "C" void on_stop_signal(int signal) {
  const int saved = errno;
  const int64_t now = now_nanoseconds();
  int none = 0;
  if (first_signal.compare_exchange_strong(none, signal)) {
    first_nanoseconds.store(now);
    const char byte = 's';
    if (::write(wake_fd.load(), &byte, 1) < 0) {  // the flag is up in any case
    }
  } else {
    const int64_t first = first_nanoseconds.load();
    const int64_t same = std::chrono::nanoseconds(kSameSignal).count();
    if (first != 0 && now - first > same) ::_exit(128 + signal);
  }
  errno = saved;
}

}  // namespace

struct StopSignals::State {
  enum class Ending { Nobody, Rank, Thread };
  Hooks hooks;
  std::chrono::milliseconds grace;
  int pipe[2] = {-1, -1};
  struct sigaction old[3] = {};
  struct sigaction old_xfsz {};
  std::mutex mutex;
  Ending ending = Ending::Nobody;
  std::thread thread;

  // Waits for a byte; false after the timeout.
  char wait(int timeout_ms) const {
    struct pollfd p {
      pipe[0], POLLIN, 0
    };
    for (;;) {
      const int n = ::poll(&p, 1, timeout_ms);
      if (n < 0 && errno == EINTR) continue;
      char byte = 0;
      if (n <= 0 || ::read(pipe[0], &byte, 1) != 1) return 0;
      return byte;
    }
  }

  void watch() {
    if (wait(-1) != 's') return;
    const int signal = first_signal.load();
    const auto overdue_at = std::chrono::steady_clock::now() + grace;
    if (hooks.on_signal) hooks.on_signal(signal);
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        overdue_at - std::chrono::steady_clock::now());
    if (left.count() > 0 && wait(int(left.count())) != 0) return;  // settled, or the end
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (ending != Ending::Nobody) return;
      ending = Ending::Thread;
    }
    if (hooks.on_overdue) hooks.on_overdue(signal);
  }
};

StopSignals::StopSignals(Hooks hooks, std::chrono::milliseconds grace)
    : state_(std::make_unique<State>()) {
  state_->hooks = std::move(hooks);
  state_->grace = grace;
  CERTKV_EXPECT(::pipe2(state_->pipe, O_CLOEXEC | O_NONBLOCK) == 0, IoError, "pipe: {}",
                std::strerror(errno));
  first_signal = 0;
  first_nanoseconds = 0;
  wake_fd = state_->pipe[1];
  // The signals stay deliverable to any thread; the handler does not care which.
  state_->thread = std::thread([s = state_.get()] { s->watch(); });
  struct sigaction action {};
  action.sa_handler = on_stop_signal;
  action.sa_flags = SA_RESTART;
  sigfillset(&action.sa_mask);
  for (size_t i = 0; i < std::size(kStopSignals); ++i) {
    ::sigaction(kStopSignals[i], &action, &state_->old[i]);
  }
  struct sigaction ignore {};
  ignore.sa_handler = SIG_IGN;
  ::sigaction(SIGXFSZ, &ignore, &state_->old_xfsz);
}

StopSignals::~StopSignals() {
  for (size_t i = 0; i < std::size(kStopSignals); ++i) {
    ::sigaction(kStopSignals[i], &state_->old[i], nullptr);
  }
  ::sigaction(SIGXFSZ, &state_->old_xfsz, nullptr);
  settled();
  const char byte = 'e';
  if (::write(state_->pipe[1], &byte, 1) == 1)
    state_->thread.join();
  else
    state_->thread.detach();
  wake_fd = -1;
  ::close(state_->pipe[0]);
  ::close(state_->pipe[1]);
}

bool StopSignals::stop() const noexcept {
  return first_signal.load() != 0;
}
int StopSignals::signal() const noexcept {
  return first_signal.load();
}

bool StopSignals::settled() noexcept {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->ending == State::Ending::Thread) return false;
  state_->ending = State::Ending::Rank;
  return true;
}

const char* signal_name(int signal) {
  switch (signal) {
    case SIGINT:
      return "SIGINT";
    case SIGTERM:
      return "SIGTERM";
    case SIGUSR1:
      return "SIGUSR1";
    default:
      return "signal";
  }
}

}  // namespace certkv
