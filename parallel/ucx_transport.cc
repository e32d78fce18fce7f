#include "parallel/ucx_transport.h"

#include <netdb.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <future>
#include <optional>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "parallel/ucx_worker.h"

namespace certkv {
namespace {

using Command = std::function<void(UcxWorker&)>;

class UcxTransport : public Transport {
 public:
  UcxTransport(const JobKey& key, const TransportOptions& options, TransportHandler handler)
      : options_(options),
        context_(make_ucx_context(options.require)),
        networks_(ucx_networks(context_.get())),
        pool_(options.limits.window_bytes),
        wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    CERTKV_EXPECT(wake_ >= 0, CommError, "eventfd: {}", std::strerror(errno));
    std::promise<std::string> started;
    thread_ = std::thread([this, &key, &started] { own(key, started); });
    try {
      address_ = started.get_future().get();
    } catch (...) {
      thread_.join();
      ::close(wake_);
      throw;
    }
    // From here on requests are taken.
    handlers_.emplace(std::move(handler), pool_, options.limits);
    post([this](UcxWorker&) { answering_ = true; });
    log_info("{}", description());
  }

  ~UcxTransport() override {
    post([this](UcxWorker&) { answering_ = false; });
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake();
    thread_.join();
    handlers_.reset();  // its late answers find nobody
    ::close(wake_);
  }

  std::string address() const override { return address_; }
  std::string description() const override {
    return fmt::format("network ({}): {}{}", options_.require, networks_,
                       address_.empty() ? "" : ", listening at " + address_);
  }

  PeerId connect(const std::string& address, Deadline deadline) override {
    const auto [host, port] = split_address(address);
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
    CERTKV_EXPECT(error == 0 && found != nullptr, CommError, "connecting to {}: {}", address,
                  gai_strerror(error));
    const std::shared_ptr<addrinfo> owner(found, freeaddrinfo);
    auto info = std::make_shared<PeerInfo>();
    const uint64_t number = enter(info);
    post([number, info, owner](UcxWorker& w) {
      w.connect(number, info, owner->ai_addr, owner->ai_addrlen);
    });
    std::unique_lock lock(info->mutex);
    const auto decided = [&] { return info->established || !info->lost.empty(); };
    if (deadline.at() == Deadline::Clock::time_point::max()) {
      info->changed.wait(lock, decided);
    } else {
      info->changed.wait_until(lock, deadline.at(), decided);
    }
    const std::string lost = info->lost;
    const bool in_time = decided();
    lock.unlock();
    if (in_time && lost.empty()) return {number};
    disconnect({number});
    CERTKV_EXPECT(in_time, DeadlineExceeded, "{} did not answer in time", address);
    CERTKV_THROW(CommError, "connecting to {}: {}", address, lost);
  }

  void disconnect(PeerId peer) override {
    if (const auto info = find(peer)) info->lose("disconnected");
    post([number = peer.number](UcxWorker& w) { w.lose(number, "disconnected"); });
  }

  bool alive(PeerId peer) const override {
    const auto info = find(peer);
    if (info == nullptr) return false;
    const std::lock_guard lock(info->mutex);
    return info->established && info->lost.empty();
  }

  std::string why_lost(PeerId peer) const override {
    const auto info = find(peer);
    if (info == nullptr) return "there is no such connection";
    const std::lock_guard lock(info->mutex);
    return info->lost;
  }

  TransportCall call(PeerId peer, uint32_t op, std::span<const std::span<const std::byte>> parts,
                     size_t reply_bytes, Deadline deadline) override {
    PreparedCall prepared = prepare_call(pool_, options_.limits, parts, reply_bytes, deadline);
    if (!alive(peer)) {
      prepared.state->end(CallStatus::PeerLost, 0, why_lost(peer));
      return TransportCall(prepared.state);
    }
    const auto request = std::make_shared<Window>(std::move(prepared.request));
    const auto state = prepared.state;
    if (!post([=](UcxWorker& w) { w.call(peer.number, op, std::move(*request), state); })) {
      state->end(CallStatus::PeerLost, 0, "the transport was closed");
    }
    return TransportCall(state);
  }

 private:
  uint64_t enter(const std::shared_ptr<PeerInfo>& info) {
    const std::lock_guard lock(mutex_);
    std::erase_if(peers_, [](const auto& entry) { return entry.second.expired(); });
    peers_[next_] = info;
    kept_.push_back(info);
    if (kept_.size() > kKept) kept_.pop_front();
    return next_++;
  }
  std::shared_ptr<PeerInfo> find(PeerId peer) const {
    const std::lock_guard lock(mutex_);
    const auto it = peers_.find(peer.number);
    return it == peers_.end() ? nullptr : it->second.lock();
  }

  bool post(Command command) {
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return false;
      commands_.push_back(std::move(command));
    }
    wake();
    return true;
  }
  void wake() const {
    const uint64_t one = 1;
    if (write(wake_, &one, sizeof one) < 0) return;  // full: it is awake already
  }

  bool handle(HandlerTask task) {
    if (!answering_) return false;
    task.answer = [this, from = task.from, call = task.call](CallStatus status, Window reply,
                                                             size_t bytes) {
      const auto held = std::make_shared<Window>(std::move(reply));
      post([=](UcxWorker& w) { w.answer(from.number, call, status, std::move(*held), bytes); });
    };
    return handlers_->add(std::move(task));
  }

  // The owner thread.
  void own(const JobKey& key, std::promise<std::string>& started) {
    std::optional<UcxWorker> worker;
    try {
      worker.emplace(key, options_, context_.get(), pool_);
      worker->on_request = [this](HandlerTask task) { return handle(std::move(task)); };
      worker->on_accept = [this](std::shared_ptr<PeerInfo> info) { return enter(info); };
      std::string address;
      if (!options_.listen.empty()) {
        const auto [host, port] = split_address(options_.listen);
        const bool v6 = host.find(':') != host.npos;
        address = fmt::format("{}{}{}:{}", v6 ? "[" : "", host, v6 ? "]" : "",
                              worker->listen(host, port));
      }
      started.set_value(address);
    } catch (...) {
      worker.reset();
      started.set_exception(std::current_exception());
      return;
    }
    std::vector<Command> commands;
    for (;;) {
      {
        const std::lock_guard lock(mutex_);
        commands.swap(commands_);
        if (commands.empty() && stop_) break;
      }
      for (const Command& command : commands) command(*worker);
      const bool busy = !commands.empty();
      commands.clear();
      if (worker->turn() || busy || !worker->arm()) continue;
      const auto left = worker->next_tick() - Deadline::Clock::now();
      const auto ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
      pollfd p[2] = {{worker->descriptor(), POLLIN, 0}, {wake_, POLLIN, 0}};
      poll(p, 2, int(std::max<int64_t>(ms, 0)));
      uint64_t drained = 0;
      if ((p[1].revents & POLLIN) != 0 && read(wake_, &drained, sizeof drained) < 0) continue;
    }
    worker.reset();
  }

  static constexpr size_t kKept = 1024;  // connections that are still known by their end

  const TransportOptions options_;
  UcxContext context_;
  const std::string networks_;
  WindowPool pool_;
  const int wake_;
  std::string address_;
  std::optional<HandlerPool> handlers_;
  bool answering_ = false;  // owner thread only

  mutable std::mutex mutex_;  // guards everything below down to stop_
  std::vector<Command> commands_;
  std::map<uint64_t, std::weak_ptr<PeerInfo>> peers_;
  std::deque<std::shared_ptr<PeerInfo>> kept_;
  uint64_t next_ = 1;
  bool stop_ = false;

  std::thread thread_;
};

}  // namespace

std::unique_ptr<Transport> make_ucx_transport(const JobKey& key, const TransportOptions& options,
                                              TransportHandler handler) {
  check_transport_options(options);
  return std::make_unique<UcxTransport>(key, options, std::move(handler));
}

}  // namespace certkv
