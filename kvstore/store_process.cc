#include "kvstore/store_process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string_view>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "kvstore/arena.h"
#include "kvstore/control.h"
#include "kvstore/holder.h"
#include "kvstore/unique_fd.h"

namespace certkv {
namespace {

using std::chrono::milliseconds;

constexpr int kReadyFd = 3;  // where the child finds the pipe

// ---- the line protocol of the ready pipe: "pid N", "memory BYTES", "ready SOCKET", "error KIND
// TEXT"
// ------

void tell(int fd, const std::string& line) {
  if (fd < 0) return;
  const std::string text = line + "\n";
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // whoever started us is gone: attach_within decides
    done += size_t(n);
  }
}

std::string one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

[[noreturn]] void throw_as_told(std::string_view kind, const std::string& text) {
  for (int k = 0; k <= int(ErrorKind::Stopped); ++k) {
    if (kind == error_kind_name(ErrorKind(k))) throw Error(ErrorKind(k), text);
  }
  CERTKV_THROW(StoreLost, "the store could not start: {}", text);
}

// ---- starting -----------------------------------------------------------------------------------

// Ends a process that is half a copy of a rank: no handler of the rank's, nor of a sanitizer, runs.
[[noreturn]] void quit(int code) {
  for (;;) syscall(SYS_exit_group, code);
}

// Runs between fork and exec: async-signal-safe calls only.
[[noreturn]] void become_store(const char* executable, char* const* argv, int ready) {
  if (setsid() < 0) quit(127);
  const pid_t pid = fork();  // the store is nobody's child, so nobody has to wait for it
  if (pid != 0) quit(pid < 0 ? 127 : 0);
  // `ready` may be 3 already, in which case dup2 would leave its close-on-exec mark in place.
  if (ready == kReadyFd ? fcntl(ready, F_SETFD, 0) < 0 : dup2(ready, kReadyFd) < 0) quit(127);
  const int null = open("/dev/null", O_RDWR);
  if (null < 0) quit(127);
  if (dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0) quit(127);
  // MPI's sockets and the launcher's pipes must not be held open by the store.
  if (close_range(kReadyFd + 1, ~0U, 0) != 0) {
    for (int fd = kReadyFd + 1; fd < 65536; ++fd) close(fd);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  for (const int s : {SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGCHLD}) std::signal(s, SIG_DFL);
  if (chdir("/") != 0) quit(127);
  // Said before exec, so that whatever hangs afterwards can be ended.
  char line[32] = "pid ";
  size_t length = 4;
  char digits[24];
  size_t count = 0;
  for (pid_t rest = getpid(); rest > 0; rest /= 10) digits[count++] = char('0' + rest % 10);
  while (count > 0) line[length++] = digits[--count];
  line[length++] = '\n';
  if (write(kReadyFd, line, length) != ssize_t(length)) quit(127);
  execv(executable, argv);
  quit(127);
}

void launch(const StoreProcessOptions& options, int ready) {
  std::vector<std::string> words{options.executable, "store"};
  StoreProcessOptions child = options;
  child.ready_fd = kReadyFd;
  // The store works in "/", so that it keeps no folder busy.
  if (!child.socket.empty() && child.socket[0] != '@') {
    child.socket = std::filesystem::absolute(child.socket);
  }
  for (std::string& w : store_arguments(child)) words.push_back(std::move(w));
  std::vector<char*> argv;
  for (std::string& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  const pid_t pid = fork();
  CERTKV_EXPECT(pid >= 0, OutOfMemory, "starting the store: fork: {}", std::strerror(errno));
  if (pid == 0) become_store(options.executable.c_str(), argv.data(), ready);
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
    if (errno == EINTR) continue;
    return;  // somebody else's SIGCHLD handling took it: the pipe tells the rest
  }
  CERTKV_EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, StoreLost,
                "the store could not be started (fork or setsid failed)");
}

// Next line of the pipe; false at its end. `silence` counts from the last byte.
bool next_line(int fd, std::string& buffer, std::string& line, milliseconds silence) {
  for (;;) {
    if (const size_t end = buffer.find('\n'); end != std::string::npos) {
      line = buffer.substr(0, end);
      buffer.erase(0, end + 1);
      return true;
    }
    const Deadline deadline = Deadline::after(silence);
    pollfd p{fd, POLLIN, 0};
    int n;
    do {
      n = poll(&p, 1, int(std::min(deadline.left(), milliseconds(3600000)).count()));
    } while (n < 0 && errno == EINTR);
    CERTKV_EXPECT(n > 0, DeadlineExceeded,
                  "the store was started, but gave no sign of life for {} ms", silence.count());
    std::array<char, 4096> chunk;
    const ssize_t got = read(fd, chunk.data(), chunk.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0 || buffer.size() > 65536) return false;
    buffer.append(chunk.data(), size_t(got));
  }
}

// ---- arguments ----------------------------------------------------------------------------------

int64_t to_number(const std::string& key, const std::string& text) {
  int64_t x = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
  CERTKV_EXPECT(error == std::errc() && end == text.data() + text.size(), InvalidArgument,
                "store: {} '{}' is no whole number", key, text);
  return x;
}

int exit_code(ErrorKind kind) {
  // Memory that lacks at the start: the arena asked for does not fit this machine.
  return kind == ErrorKind::InvalidArgument || kind == ErrorKind::OutOfMemory ? 2 : 1;
}

}  // namespace

std::vector<std::string> store_arguments(const StoreProcessOptions& o) {
  std::vector<std::string> a{"--arena-bytes",      std::to_string(o.arena_bytes),
                             "--linger-ms",        std::to_string(o.linger.count()),
                             "--attach-within-ms", std::to_string(o.attach_within.count()),
                             "--max-connections",  std::to_string(o.max_connections)};
  if (!o.listen.empty()) a.insert(a.end(), {"--listen", o.listen, "--require", o.require});
  if (!o.peers.empty()) a.insert(a.end(), {"--peers", o.peers});
  if (o.replicas != 1) a.insert(a.end(), {"--replicas", std::to_string(o.replicas)});
  if (!o.key_file.empty()) a.insert(a.end(), {"--key-file", o.key_file});
  if (o.key_fd >= 0) a.insert(a.end(), {"--key-fd", std::to_string(o.key_fd)});
  if (!o.socket.empty()) a.insert(a.end(), {"--socket", o.socket});
  if (o.ready_fd >= 0) a.insert(a.end(), {"--ready-fd", std::to_string(o.ready_fd)});
  return a;
}

StoreProcessOptions parse_store_arguments(const std::vector<std::string>& arguments) {
  StoreProcessOptions o;
  for (size_t i = 0; i < arguments.size(); i += 2) {
    const std::string& key = arguments[i];
    CERTKV_EXPECT(i + 1 < arguments.size(), InvalidArgument, "store: {} needs a value", key);
    const std::string& value = arguments[i + 1];
    if (key == "--socket") {
      o.socket = value;
    } else if (key == "--arena-bytes") {
      const int64_t x = to_number(key, value);
      CERTKV_EXPECT(x > 0, InvalidArgument, "store: {} must be above 0", key);
      o.arena_bytes = uint64_t(x);
    } else if (key == "--linger-ms") {
      o.linger = milliseconds(std::clamp<int64_t>(to_number(key, value), -1, 1 << 30));
    } else if (key == "--attach-within-ms") {
      o.attach_within = milliseconds(std::clamp<int64_t>(to_number(key, value), -1, 1 << 30));
    } else if (key == "--max-connections") {
      o.max_connections = size_t(std::clamp<int64_t>(to_number(key, value), 1, 65536));
    } else if (key == "--listen") {
      o.listen = value;
    } else if (key == "--require") {
      o.require = value;
    } else if (key == "--peers") {
      o.peers = value;
    } else if (key == "--replicas") {
      o.replicas = int(std::clamp<int64_t>(to_number(key, value), 1, 3));
    } else if (key == "--key-file") {
      o.key_file = value;
    } else if (key == "--key-fd") {
      o.key_fd = int(std::clamp<int64_t>(to_number(key, value), -1, 1 << 20));
    } else if (key == "--ready-fd") {
      o.ready_fd = int(std::clamp<int64_t>(to_number(key, value), -1, 1 << 20));
    } else {
      CERTKV_THROW(InvalidArgument,
                   "store: unknown argument {}; known are --socket, --arena-bytes, --linger-ms, "
                   "--attach-within-ms, --max-connections, --ready-fd, --listen, --require, "
                   "--peers, --replicas, --key-file, --key-fd",
                   key);
    }
  }
  CERTKV_EXPECT(o.arena_bytes > 0, InvalidArgument, "store: --arena-bytes is needed");
  return o;
}

namespace {

// The child that serves other nodes, where one is wanted.
ServerChildOptions server_child(const StoreProcessOptions& o) {
  ServerChildOptions child;
  if (o.listen.empty()) return child;
  child.key = o.key_fd >= 0         ? JobKey::from_fd(o.key_fd)
              : !o.key_file.empty() ? JobKey::from_file(o.key_file)
                                    : JobKey::generate();
  child.command = {
      o.executable, "store-server", "--listen", o.listen,
      "--require",  o.require,      "--key-fd", std::to_string(ServerChildOptions::kKeyFd)};
  if (!o.peers.empty()) child.command.insert(child.command.end(), {"--peers", o.peers});
  child.command.insert(child.command.end(), {"--replicas", std::to_string(o.replicas)});
  return child;
}

}  // namespace

SpawnedStore spawn_store(const StoreProcessOptions& options, milliseconds silence) {
  int ends[2];
  CERTKV_EXPECT(pipe2(ends, O_CLOEXEC) == 0, OutOfMemory, "starting the store: pipe: {}",
                std::strerror(errno));
  UniqueFd ours(ends[0]), theirs(ends[1]);
  CERTKV_FAILPOINT(store_spawn);
  launch(options, theirs.get());
  theirs.reset();

  SpawnedStore store;
  std::string buffer, line;
  try {
    while (next_line(ours.get(), buffer, line, silence)) {
      const size_t space = line.find(' ');
      const std::string word = line.substr(0, space);
      const std::string rest = space == line.npos ? std::string() : line.substr(space + 1);
      if (word == "pid") store.pid = to_number("pid", rest);
      if (word == "error") {
        const size_t end = rest.find(' ');
        throw_as_told(rest.substr(0, end), end == rest.npos ? rest : rest.substr(end + 1));
      }
      if (word == "ready") {
        store.socket = rest;
        return store;
      }
    }
  } catch (const Error& e) {
    // It may be stopped or stuck, and nobody else knows of it yet.
    if (e.kind() == ErrorKind::DeadlineExceeded && store.pid > 1) kill(pid_t(store.pid), SIGKILL);
    throw;
  }
  CERTKV_THROW(StoreLost,
               "the store ended before it was ready: its messages are on standard error, and "
               "`{} store` must be a certkv program",
               options.executable);
}

int run_store(const StoreProcessOptions& options) {
  UniqueFd ready(options.ready_fd);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGHUP, SIG_IGN);
  log_set_name("store");
  try {
    CERTKV_FAILPOINT(store_start);
    const uint64_t boot_nonce = random_u64() | 1;
    HolderOptions holder_options;
    holder_options.socket = options.socket;
    holder_options.linger = options.linger;
    holder_options.attach_within = options.attach_within;
    holder_options.max_connections = options.max_connections;
    holder_options.handle_signals = true;
    holder_options.quiet_at_end = ready.valid();
    holder_options.server = server_child(options);
    Holder holder(
        Arena::create(options.arena_bytes, boot_nonce,
                      [&](uint64_t bytes) { tell(ready.get(), fmt::format("memory {}", bytes)); }),
        boot_nonce, holder_options);
    CERTKV_FAILPOINT(store_ready);
    if (ready.valid()) {
      tell(ready.get(), "ready " + holder.socket());
      ready.reset();
    } else {
      fmt::print("{}\n", holder.socket());
      std::fflush(stdout);
    }
    log_debug("{} bytes at {}", options.arena_bytes, holder.socket());
    log_debug("ended: {}", holder.run());
    return 0;
  } catch (const Error& e) {
    // Who started us says it, once; without anybody we say it.
    if (!ready.valid()) log_error("{}", e.what());
    tell(ready.get(), fmt::format("error {} {}", error_kind_name(e.kind()), one_line(e.what())));
    return exit_code(e.kind());
  } catch (const std::exception& e) {
    log_error("{}", e.what());
    tell(ready.get(), fmt::format("error IoError {}", one_line(e.what())));
    return 1;
  }
}

}  // namespace certkv
