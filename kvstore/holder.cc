#include "kvstore/holder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "kvstore/holder_state.h"

namespace certkv {
namespace {

namespace asio = boost::asio;

constexpr uint64_t kScrubBytes = uint64_t(16) << 20;  // zeroed between two turns of the loop
constexpr std::chrono::milliseconds kTurn{100};       // of the progress counter

// Removes a socket file that this user's dead store left behind.
void sweep_socket_file(const std::string& path, const LocalStream::endpoint& endpoint) {
  struct stat st {};
  if (lstat(path.c_str(), &st) != 0) return;
  CERTKV_EXPECT(S_ISSOCK(st.st_mode) && st.st_uid == getuid(), InvalidArgument,
                "store socket {}: the path exists and is no socket of this user", path);
  asio::io_context io;
  LocalStream::socket probe(io);
  ErrorCode error;
  probe.connect(endpoint, error);
  CERTKV_EXPECT(error == asio::error::connection_refused, InvalidArgument,
                "store socket {}: a store is running there; attach to it or choose another path",
                path);
  unlink(path.c_str());
}

}  // namespace

void HolderState::bind() {
  CERTKV_FAILPOINT(holder_bind);
  if (options.socket.empty()) options.socket = random_socket_name();
  char path[108];
  size_t length = 0;
  CERTKV_EXPECT(fill_socket_path(options.socket, path, length), InvalidArgument,
                "store socket '{}': a name has 1 .. 106 characters after '@' or is a path of that "
                "length",
                options.socket);
  const bool abstract = options.socket[0] == '@';
  const LocalStream::endpoint endpoint(abstract ? std::string("\0", 1) + options.socket.substr(1)
                                                : options.socket);
  if (!abstract) sweep_socket_file(options.socket, endpoint);
  ErrorCode error;
  acceptor.open(LocalStream(), error);
  const mode_t before = umask(0177);  // the file is 0600 from its first moment
  if (!error) acceptor.bind(endpoint, error);
  umask(before);
  CERTKV_EXPECT(!error, InvalidArgument, "store socket {}: {}", options.socket, error.message());
  if (!abstract) socket_file = options.socket;
  acceptor.listen(128, error);
  CERTKV_EXPECT(!error, IoError, "store socket {}: {}", options.socket, error.message());
}

void HolderState::accept() {
  acceptor.async_accept([this](ErrorCode error, LocalStream::socket socket) {
    if (ended) return;
    CERTKV_FAILPOINT(holder_accept);
    if (!error) {
      const HolderPeer peer = peer_of(socket.native_handle());
      ErrorCode ignored;
      if (peer.uid != geteuid()) {
        ++refused;
        log_warning("connection of pid {} refused: it runs as user {}, the store as {}", peer.pid,
                    peer.uid, geteuid());
        socket.close(ignored);
      } else if (connections.size() >= options.max_connections) {
        ++refused;
        log_warning("connection of pid {} refused: {} are open already", peer.pid,
                    connections.size());
        socket.close(ignored);
      } else {
        socket.non_blocking(true, ignored);
        auto connection = std::make_shared<HolderConnection>(*this, std::move(socket), peer);
        connections[connection.get()] = connection;
        connection->start();
      }
      return accept();
    }
    // Out of descriptors, most likely: try again in a while instead of spinning.
    auto pause = std::make_shared<asio::steady_timer>(io, kTurn);
    pause->async_wait([this, pause](ErrorCode) {
      if (!ended) accept();
    });
  });
}

void HolderState::turn() {
  CERTKV_FAILPOINT(holder_turn);
  arena.stamp_progress();
  turn_timer.expires_after(kTurn);
  turn_timer.async_wait([this](ErrorCode error) {
    if (!error && !ended) turn();
  });
}

void HolderState::scrub() {
  if (scrubbing || extents.dirty_bytes() == 0) return;
  scrubbing = true;
  asio::post(io, [this] {
    scrubbing = false;
    CERTKV_FAILPOINT(holder_scrub);
    extents.scrub(kScrubBytes);
    if (!ended) scrub();
  });
}

void HolderState::watch_signals() {
  signals.add(SIGTERM);
  signals.add(SIGINT);
  signals.async_wait([this](ErrorCode error, int signal) {
    if (!error) end(fmt::format("signal {}", signal));
  });
}

void HolderState::end_after(std::chrono::milliseconds d, const std::string& reason) {
  if (d.count() < 0) return;
  life_timer.expires_after(d);
  life_timer.async_wait([this, reason](ErrorCode error) {
    if (!error && attached == 0) end(reason);
  });
}

void HolderState::end(const std::string& reason) {
  if (std::exchange(ended, true)) return;
  why = reason;
  ErrorCode ignored;
  acceptor.close(ignored);
  signals.cancel(ignored);
  life_timer.cancel();
  turn_timer.cancel();
  if (server != nullptr) server->stop();
  const auto open = connections;  // close() erases
  for (const auto& [key, connection] : open) connection->close("the store ends");
  io.stop();
}

void HolderState::last_rank_gone() {
  if (ended) return;
  end_after(options.linger, "the last rank is gone");
  if (options.quiet_at_end) {
    const int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (null >= 0) {
      dup2(null, STDERR_FILENO);
      close(null);
    }
  }
}

std::string HolderState::status() const {
  const auto up = std::chrono::steady_clock::now() - started;
  std::string text = fmt::format(
      "{{\"pid\":{},\"boot_nonce\":\"{:016x}\",\"uptime_seconds\":{:.3f},"
      "\"arena_bytes\":{},\"total_bytes\":{},\"free_bytes\":{},\"dirty_bytes\":{},"
      "\"largest_bytes\":{},\"reservations\":{},\"orphans\":{},\"connections\":{},"
      "\"connections_refused\":{},\"frames_malformed\":{},\"dead_ranks\":{},\"progress\":{},"
      "\"server\":{},"
      "\"sessions\":[",
      getpid(), boot_nonce, std::chrono::duration<double>(up).count(), arena.bytes(),
      extents.total_bytes(), extents.free_bytes(), extents.dirty_bytes(), extents.largest_bytes(),
      extents.reservations(), extents.orphans(), connections.size(), refused, malformed, dead_ranks,
      arena.progress(), server == nullptr ? "null" : server->describe());
  bool first = true;
  for (const auto& [key, connection] : connections) {
    if (!connection->attached()) continue;
    if (!std::exchange(first, false)) text += ',';
    text += connection->describe();
  }
  return text + "]}";
}

Holder::Holder(Arena arena, uint64_t boot_nonce, const HolderOptions& options)
    : state_(std::make_unique<HolderState>(std::move(arena), boot_nonce, options)) {
  state_->extents.set_grace(std::max(options.linger, std::chrono::milliseconds(0)));
  state_->bind();
  if (options.server.command.empty()) return;
  ServerChildOptions child = options.server;
  child.command.insert(child.command.end(), {"--holder", socket()});
  state_->server = std::make_unique<ServerChild>(state_->io, std::move(child), [s = state_.get()] {
    s->arena.set_replication({});  // nobody waits for a server that is gone
  });
}

Holder::~Holder() {
  state_->end("the holder is destroyed");
  if (!state_->socket_file.empty()) unlink(state_->socket_file.c_str());
}

const std::string& Holder::socket() const {
  return state_->options.socket;
}

std::string Holder::run() {
  HolderState& s = *state_;
  if (s.options.handle_signals) s.watch_signals();
  s.accept();
  s.turn();
  if (s.server != nullptr) s.server->start();
  s.end_after(s.options.attach_within, "no rank attached in time");
  s.io.run();
  return s.why;
}

void Holder::stop() {
  asio::post(state_->io, [s = state_.get()] { s->end("stopped"); });
}

}  // namespace certkv
