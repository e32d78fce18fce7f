#include "kvstore/server_child.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "kernels/base/log.h"
#include "kvstore/unique_fd.h"

namespace certkv {
namespace {

using std::chrono::milliseconds;
using ErrorCode = boost::system::error_code;

std::string text_of(int status) {
  if (WIFEXITED(status)) return fmt::format("exit code {}", WEXITSTATUS(status));
  return fmt::format("signal {}", WTERMSIG(status));
}

// Between fork and exec: async-signal-safe calls only.
[[noreturn]] void become(char* const* argv, int key, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(127);  // it died before the line above
  if (key >= 0) {
    if (key == ServerChildOptions::kKeyFd ? fcntl(key, F_SETFD, 0) < 0
                                          : dup2(key, ServerChildOptions::kKeyFd) < 0) {
      _exit(127);
    }
  }
  if (close_range(ServerChildOptions::kKeyFd + (key >= 0 ? 1 : 0), ~0U, 0) != 0) _exit(127);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  for (const int s : {SIGTERM, SIGINT, SIGHUP, SIGPIPE, SIGXFSZ}) std::signal(s, SIG_DFL);
  execv(argv[0], argv);
  _exit(127);
}

}  // namespace

ServerChild::ServerChild(boost::asio::io_context& io, ServerChildOptions options,
                         std::function<void()> ended)
    : io_(io), options_(std::move(options)), ended_(std::move(ended)), handle_(io), timer_(io) {}

ServerChild::~ServerChild() {
  stop();
  if (pid_ == 0) return;
  kill(pid_t(pid_), SIGKILL);
  int status = 0;
  while (waitpid(pid_t(pid_), &status, 0) < 0 && errno == EINTR) {
  }
}

void ServerChild::start() {
  if (!options_.command.empty()) launch();
}

void ServerChild::stop() {
  stopping_ = true;
  timer_.cancel();
  ErrorCode ignored;
  handle_.cancel(ignored);
  if (pid_ != 0) kill(pid_t(pid_), SIGTERM);
}

void ServerChild::launch() {
  started_ = std::chrono::steady_clock::now();
  UniqueFd ours, theirs;
  if (options_.key) {
    // A key fits a pipe's buffer, so it is there before the child asks.
    int ends[2];
    const std::string hex = options_.key->hex();
    if (pipe2(ends, O_CLOEXEC) != 0) return later();
    theirs.reset(ends[0]);
    ours.reset(ends[1]);
    if (write(ours.get(), hex.data(), hex.size()) != ssize_t(hex.size())) return later();
    ours.reset();
  }
  std::vector<std::string> words = options_.command;
  std::vector<char*> argv;
  for (auto& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  const pid_t parent = getpid(), pid = fork();
  if (pid == 0) become(argv.data(), theirs.valid() ? theirs.get() : -1, parent);
  if (pid < 0) {
    last_end_ = std::string("fork: ") + std::strerror(errno);
    return later();
  }
  pid_ = pid;
  const int handle = int(syscall(SYS_pidfd_open, pid, 0));
  if (handle < 0) {
    log_error("the server (pid {}) cannot be watched: {}; it is ended", pid, std::strerror(errno));
    kill(pid, SIGKILL);
    return take_end();
  }
  ErrorCode ignored;
  handle_.assign(handle, ignored);
  log_info("the store's server is pid {}", pid);
  watch();
}

void ServerChild::watch() {
  handle_.async_wait(boost::asio::posix::stream_descriptor::wait_read, [this](ErrorCode error) {
    if (!error && !stopping_) take_end();
  });
}

void ServerChild::take_end() {
  int status = 0;
  pid_t got;
  do {
    got = waitpid(pid_t(pid_), &status, 0);
  } while (got < 0 && errno == EINTR);
  last_end_ = got == pid_t(pid_) ? text_of(status) : "an unknown end";
  ErrorCode ignored;
  handle_.close(ignored);
  const int64_t ended = std::exchange(pid_, 0);
  const bool stable = std::chrono::steady_clock::now() - started_ >= options_.stable;
  failures_ = stable ? 0 : failures_ + 1;
  log_error("the store's server (pid {}) ended by {}", ended, last_end_);
  if (ended_) ended_();
  later();
}

void ServerChild::later() {
  if (stopping_) return;
  if (failures_ >= options_.starts) {
    given_up_ = true;
    log_error(
        "the store's server ended {} times soon after its start ({}): it is given up; "
        "originals remain, other nodes cannot read them",
        failures_, last_end_);
    return;
  }
  const auto grown = options_.first_pause * (1 << std::clamp(failures_ - 1, 0, 16));
  const auto pause = std::min<milliseconds>(grown, options_.longest_pause);
  log_warning("the store's server is started again in {} ms", pause.count());
  timer_.expires_after(pause);
  timer_.async_wait([this](ErrorCode error) {
    if (error || stopping_) return;
    ++restarts_;
    launch();
  });
}

std::string ServerChild::describe() const {
  const char* state = options_.command.empty() ? "off"
                      : given_up_              ? "given up"
                      : pid_ != 0              ? "running"
                                               : "restarting";
  return fmt::format("{{\"state\":\"{}\",\"pid\":{},\"restarts\":{},\"last_end\":\"{}\"}}", state,
                     pid_, restarts_, last_end_);
}

}  // namespace certkv
