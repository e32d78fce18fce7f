#include "kvstore/server/server_process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/signalfd.h>

#include <charconv>
#include <csignal>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kvstore/server/block_server.h"
#include "kvstore/server/replica_store.h"
#include "kvstore/server/replicator.h"
#include "kvstore/server/wire.h"
#include "kvstore/unique_fd.h"
#include "parallel/ucx_transport.h"

namespace certkv {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kAttach{5000};
constexpr milliseconds kReport{200};
constexpr milliseconds kListenPause{100};
constexpr int kListenAttempts = 20;
constexpr int kServerRank = -1;  // for the holder's messages

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& w : words) text += (text.empty() ? "" : ",") + w;
  return text;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    if (end > at) words.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return words;
}

JobKey key_of(const StoreServerOptions& o) {
  CERTKV_EXPECT((o.key_fd >= 0) != !o.key_file.empty(), InvalidArgument,
                "store-server: the job's key is needed, from --key-file or from --key-fd");
  return o.key_fd >= 0 ? JobKey::from_fd(o.key_fd) : JobKey::from_file(o.key_file);
}

// The port of one that was killed a moment ago may still be held by what it left in the kernel.
std::unique_ptr<Transport> make_transport(const JobKey& key, const TransportOptions& options,
                                          const TransportHandler& handler) {
  for (int attempt = 1;; ++attempt) {
    try {
      return make_ucx_transport(key, options, handler);
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::InvalidArgument || attempt >= kListenAttempts ||
          std::string(e.what()).find("listening at") == std::string::npos) {
        throw;
      }
      std::this_thread::sleep_for(kListenPause);
    }
  }
}

int serve(const StoreServerOptions& options) {
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  sigprocmask(SIG_BLOCK, &ends, nullptr);  // before any thread is made
  const UniqueFd signals(signalfd(-1, &ends, SFD_CLOEXEC));

  const JobKey key = key_of(options);
  StoreClientOptions session;
  session.socket = options.holder;
  session.rank = kServerRank;
  const auto client = StoreClient::attach(session, Deadline::after(kAttach));
  const auto directory = std::make_shared<BlockDirectory>(client);
  BlockServer blocks(directory);
  ReplicaStore copies(client, directory);
  TransportOptions network;
  network.listen = options.listen;
  network.require = options.require;
  network.heartbeat = options.heartbeat;
  network.silence = options.silence;
  network.limits.handler_threads = 2;  // a copy that waits for the holder keeps no reader waiting
  const std::shared_ptr<Transport> transport =
      make_transport(key, network, [&](const TransportRequest& request, TransportReply& reply) {
        switch (ServerOp(request.op)) {
          case ServerOp::Read:
            return blocks.read(request, reply);
          case ServerOp::Replicate:
            return copies.take(request, reply);
          case ServerOp::Forget:
            return copies.forget(request, reply);
        }
        CERTKV_THROW(InvalidArgument, "operation {} is not known to this server", request.op);
      });
  // Until placement comes from the members of a cluster: the list as it was given.
  std::vector<std::string> peers = options.peers;
  std::erase(peers, transport->address());
  ReplicatorOptions copying;
  copying.replicas = options.replicas;
  copying.lag_limit_bytes = options.lag_limit_bytes;
  std::optional<Replicator> replicator;
  if (options.replicas > 1) {
    replicator.emplace(
        client, directory, transport, [peers](const OwnerId&, uint32_t, uint32_t) { return peers; },
        copying);
  }
  for (;;) {
    const BlockServerCounts c = blocks.counts();
    nlohmann::ordered_json report;
    report["address"] = transport->address();
    report["peers"] = options.peers;
    report["served"] = {{"requests", c.requests}, {"blocks", c.blocks},   {"ok", c.ok},
                        {"absent", c.absent},     {"corrupt", c.corrupt}, {"bytes", c.bytes}};
    const ReplicaCounts held = copies.counts();
    report["held_for_others"] = {{"runs", held.runs},
                                 {"blocks", held.blocks},
                                 {"bytes", held.bytes},
                                 {"refused", held.refused}};
    const ReplicationStatus r = replicator ? replicator->status() : ReplicationStatus();
    report["replication"] = {
        {"replicas", options.replicas},     {"runs", r.runs},
        {"sealed_blocks", r.sealed_blocks}, {"copied_blocks", r.copied_blocks},
        {"lag_bytes", r.lag_bytes},         {"missing_copies", r.missing_copies},
        {"damaged_runs", r.damaged_runs}};
    client->report(report.dump());
    client->stamp_progress();
    pollfd p{signals.get(), POLLIN, 0};
    if (poll(&p, 1, int(kReport.count())) > 0) return 0;
    client->throw_if_lost();
  }
}

}  // namespace

int run_store_server(const StoreServerOptions& options) {
  std::signal(SIGPIPE, SIG_IGN);
  log_set_name("store-server");
  try {
    return serve(options);
  } catch (const Error& e) {
    log_error("{}", e.what());
    if (e.kind() == ErrorKind::StoreLost || e.kind() == ErrorKind::DeadlineExceeded) return 4;
    return e.kind() == ErrorKind::InvalidArgument || e.kind() == ErrorKind::BadFile ? 2 : 1;
  } catch (const std::exception& e) {
    log_error("{}", e.what());
    return 1;
  }
}

std::vector<std::string> store_server_arguments(const StoreServerOptions& o) {
  std::vector<std::string> a{"--holder", o.holder, "--listen", o.listen, "--require", o.require};
  a.insert(a.end(), {"--heartbeat-ms", std::to_string(o.heartbeat.count()), "--silence-ms",
                     std::to_string(o.silence.count())});
  if (o.key_fd >= 0) a.insert(a.end(), {"--key-fd", std::to_string(o.key_fd)});
  if (!o.key_file.empty()) a.insert(a.end(), {"--key-file", o.key_file});
  if (!o.peers.empty()) a.insert(a.end(), {"--peers", join(o.peers)});
  a.insert(a.end(), {"--replicas", std::to_string(o.replicas), "--lag-limit-bytes",
                     std::to_string(o.lag_limit_bytes)});
  return a;
}

StoreServerOptions parse_store_server_arguments(const std::vector<std::string>& arguments) {
  StoreServerOptions o;
  const auto number = [](const std::string& key, const std::string& text) {
    int64_t x = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
    CERTKV_EXPECT(
        error == std::errc() && end == text.data() + text.size() && x >= 0 && x < int64_t(1) << 50,
        InvalidArgument, "store-server: {} '{}' is no whole number", key, text);
    return x;
  };
  for (size_t i = 0; i < arguments.size(); i += 2) {
    const std::string& key = arguments[i];
    CERTKV_EXPECT(i + 1 < arguments.size(), InvalidArgument, "store-server: {} needs a value", key);
    const std::string& value = arguments[i + 1];
    if (key == "--holder") {
      o.holder = value;
    } else if (key == "--listen") {
      o.listen = value;
    } else if (key == "--require") {
      o.require = value;
    } else if (key == "--key-fd") {
      o.key_fd = int(number(key, value));
    } else if (key == "--key-file") {
      o.key_file = value;
    } else if (key == "--peers") {
      o.peers = split(value);
    } else if (key == "--replicas") {
      o.replicas = unsigned(number(key, value));
    } else if (key == "--lag-limit-bytes") {
      o.lag_limit_bytes = uint64_t(number(key, value));
    } else if (key == "--heartbeat-ms") {
      o.heartbeat = milliseconds(number(key, value));
    } else if (key == "--silence-ms") {
      o.silence = milliseconds(number(key, value));
    } else {
      CERTKV_THROW(InvalidArgument,
                   "store-server: unknown argument {}; known are --holder, --listen, --require, "
                   "--key-fd, --key-file, --peers, --replicas, --lag-limit-bytes, "
                   "--heartbeat-ms, --silence-ms",
                   key);
    }
  }
  CERTKV_EXPECT(!o.holder.empty() && !o.listen.empty(), InvalidArgument,
                "store-server: --holder SOCKET and --listen HOST:PORT are needed");
  return o;
}

}  // namespace certkv
