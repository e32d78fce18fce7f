#include "parallel/local_transport.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

#include "kernels/base/error.h"
#include "parallel/transport_parts.h"

namespace certkv {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kTick{10};

class LocalTransport;

// One end that calls, one that answers.
struct Connection {
  LocalTransport* from = nullptr;
  LocalTransport* to = nullptr;
  std::string lost;  // why; empty while it lives
  std::map<uint64_t, std::shared_ptr<CallState>> calls;
};

struct Pause {
  Clock::time_point since;
  std::vector<std::function<void()>> held;  // what would have happened meanwhile
};

class LocalNetworkImpl : public LocalNetwork,
                         public std::enable_shared_from_this<LocalNetworkImpl> {
 public:
  LocalNetworkImpl() : ticker_([this] { tick(); }) {}
  ~LocalNetworkImpl() override {
    {
      const std::lock_guard lock(mutex);
      stop_ = true;
    }
    changed_.notify_all();
    ticker_.join();
  }

  std::unique_ptr<Transport> make(const JobKey& key, const TransportOptions& options,
                                  TransportHandler handler) override;

  void kill(const std::string& address) override {
    const std::lock_guard lock(mutex);
    const auto it = listening.find(address);
    if (it == listening.end()) return;
    leave(it->second, "the connection was reset");
    listening.erase(it);
  }
  void pause(const std::string& address) override {
    const std::lock_guard lock(mutex);
    paused.try_emplace(address, Pause{Clock::now(), {}});
  }
  void resume(const std::string& address) override {
    const std::lock_guard lock(mutex);
    const auto it = paused.find(address);
    if (it == paused.end()) return;
    const Pause was = std::move(it->second);
    paused.erase(it);
    for (const auto& f : was.held) f();
  }

  // All below: REQUIRES the mutex held.
  void leave(const LocalTransport* who, const std::string& why) {
    for (auto& [number, c] : connections) {
      if (c.from == who || c.to == who) lose(c, why);
    }
  }
  static void lose(Connection& c, const std::string& why) {
    if (!c.lost.empty()) return;
    c.lost = why;
    for (auto& [id, call] : c.calls) call->end(CallStatus::PeerLost, 0, why);
    c.calls.clear();
  }
  // Runs it now, or when the address goes on.
  void when_awake(const std::string& address, std::function<void()> f) {
    const auto it = paused.find(address);
    if (it == paused.end()) {
      f();
    } else {
      it->second.held.push_back(std::move(f));
    }
  }
  void take_answer(uint64_t connection, uint64_t call, CallStatus status,
                   std::span<const std::byte> reply) {
    const auto c = connections.find(connection);
    if (c == connections.end()) return;
    const auto it = c->second.calls.find(call);
    if (it == c->second.calls.end()) return;
    const std::shared_ptr<CallState> state = it->second;
    c->second.calls.erase(it);
    if (status != CallStatus::Ok) {
      state->end(status, 0, {reinterpret_cast<const char*>(reply.data()), reply.size()});
      return;
    }
    if (!reply.empty()) std::memcpy(state->window.bytes().data(), reply.data(), reply.size());
    state->end(CallStatus::Ok, reply.size(), {});
  }

  std::mutex mutex;
  std::map<std::string, LocalTransport*> listening;
  std::map<uint64_t, Connection> connections;
  std::map<std::string, Pause> paused;
  uint64_t next = 1;

 private:
  void tick();
  std::condition_variable changed_;
  bool stop_ = false;
  std::thread ticker_;
};

class LocalTransport : public Transport {
 public:
  LocalTransport(std::shared_ptr<LocalNetworkImpl> network, const JobKey& key,
                 const TransportOptions& options, TransportHandler handler)
      : network_(std::move(network)),
        key_(key),
        options_(options),
        pool_(options.limits.window_bytes),
        handlers_(std::in_place, std::move(handler), pool_, options.limits) {
    if (options.listen.empty()) return;
    const std::lock_guard lock(network_->mutex);
    address_ = options.listen;
    if (address_.ends_with(":0")) address_ = "local:" + std::to_string(network_->next++);
    CERTKV_EXPECT(network_->listening.emplace(address_, this).second, InvalidArgument,
                  "{} is in use", address_);
  }
  ~LocalTransport() override {
    {
      const std::lock_guard lock(network_->mutex);
      const auto it = network_->listening.find(address_);
      if (it != network_->listening.end() && it->second == this) network_->listening.erase(it);
      network_->leave(this, "the transport was closed");
      for (auto& [number, c] : network_->connections) {
        if (c.from == this) c.from = nullptr;
        if (c.to == this) c.to = nullptr;
      }
    }
    handlers_.reset();
  }

  std::string address() const override { return address_; }
  std::string description() const override { return "network: this process alone"; }
  const JobKey& key() const { return key_; }
  const TransportOptions& options() const { return options_; }

  PeerId connect(const std::string& address, Deadline deadline) override {
    split_address(address);
    for (;;) {
      {
        const std::lock_guard lock(network_->mutex);
        const auto it = network_->listening.find(address);
        CERTKV_EXPECT(it != network_->listening.end(), CommError, "nobody listens at {}", address);
        if (!network_->paused.contains(address)) {
          CERTKV_EXPECT(std::ranges::equal(it->second->key().bytes(), key_.bytes()), CommError,
                        "{} has another key", address);
          const uint64_t number = network_->next++;
          network_->connections[number] = {this, it->second, {}, {}};
          return {number};
        }
      }
      CERTKV_EXPECT(!deadline.passed(), DeadlineExceeded, "{} did not answer in time", address);
      std::this_thread::sleep_for(kTick);
    }
  }
  void disconnect(PeerId peer) override {
    const std::lock_guard lock(network_->mutex);
    const auto it = network_->connections.find(peer.number);
    if (it != network_->connections.end()) LocalNetworkImpl::lose(it->second, "disconnected");
  }
  bool alive(PeerId peer) const override {
    const std::lock_guard lock(network_->mutex);
    const auto it = network_->connections.find(peer.number);
    return it != network_->connections.end() && it->second.lost.empty();
  }
  std::string why_lost(PeerId peer) const override {
    const std::lock_guard lock(network_->mutex);
    const auto it = network_->connections.find(peer.number);
    return it == network_->connections.end() ? "there never was such a connection"
                                             : it->second.lost;
  }

  TransportCall call(PeerId peer, uint32_t op, std::span<const std::span<const std::byte>> parts,
                     size_t reply_bytes, Deadline deadline) override {
    PreparedCall prepared = prepare_call(pool_, options_.limits, parts, reply_bytes, deadline);
    const auto state = prepared.state;
    const std::lock_guard lock(network_->mutex);
    const auto it = network_->connections.find(peer.number);
    if (it == network_->connections.end() || !it->second.lost.empty()) {
      state->end(CallStatus::PeerLost, 0,
                 it == network_->connections.end() ? "no such connection" : it->second.lost);
      return TransportCall(state);
    }
    Connection& c = it->second;
    std::erase_if(c.calls, [](const auto& entry) {
      const std::lock_guard inner(entry.second->mutex);
      return entry.second->status != CallStatus::Pending;
    });
    if (c.calls.size() >= options_.limits.calls) {
      state->end(CallStatus::Busy, 0, "too many calls on one connection");
      return TransportCall(state);
    }
    const uint64_t id = network_->next++;
    c.calls[id] = state;
    auto task = std::make_shared<HandlerTask>();
    task->from = peer;
    task->op = op;
    task->body = prepared.request.bytes();
    task->window = std::move(prepared.request);
    task->reply_limit = reply_bytes;
    task->deadline = deadline;
    const std::weak_ptr<LocalNetworkImpl> weak = network_;
    const std::string to = c.to->address_;
    task->answer = [weak, to, number = peer.number, id](CallStatus status, Window reply,
                                                        size_t bytes) {
      const auto network = weak.lock();
      if (network == nullptr) return;
      const std::lock_guard inner(network->mutex);
      const auto held = std::make_shared<Window>(std::move(reply));
      LocalNetworkImpl* n = network.get();
      n->when_awake(to, [=] { n->take_answer(number, id, status, held->bytes().first(bytes)); });
    };
    LocalNetworkImpl* n = network_.get();
    n->when_awake(to, [n, task, number = peer.number, id] {
      const auto at = n->connections.find(number);
      if (at == n->connections.end() || at->second.to == nullptr) return;
      if (!at->second.to->handlers_->add(std::move(*task))) {
        n->take_answer(number, id, CallStatus::Busy, {});
      }
    });
    return TransportCall(state);
  }

 private:
  const std::shared_ptr<LocalNetworkImpl> network_;
  const JobKey key_;
  const TransportOptions options_;
  std::string address_;
  WindowPool pool_;
  std::optional<HandlerPool> handlers_;
};

std::unique_ptr<Transport> LocalNetworkImpl::make(const JobKey& key,
                                                  const TransportOptions& options,
                                                  TransportHandler handler) {
  check_transport_options(options);
  return std::make_unique<LocalTransport>(shared_from_this(), key, options, std::move(handler));
}

// Finds who has been silent for too long.
void LocalNetworkImpl::tick() {
  std::unique_lock lock(mutex);
  while (!changed_.wait_for(lock, kTick, [&] { return stop_; })) {
    const auto now = Clock::now();
    for (auto& [number, c] : connections) {
      if (c.from == nullptr || c.to == nullptr) continue;
      const auto it = paused.find(c.to->address());
      const auto silence = c.from->options().silence;
      if (it != paused.end() && now - it->second.since > silence * kDeadlineFactor) {
        lose(c, fmt::format("no sign of life for {} ms", silence.count()));
      }
    }
  }
}

}  // namespace

std::shared_ptr<LocalNetwork> LocalNetwork::create() {
  return std::make_shared<LocalNetworkImpl>();
}

}  // namespace certkv
