#include "kvstore/cluster/cluster_node.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <optional>
#include <utility>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kvstore/cluster/channel.h"
#include "kvstore/control.h"
#include "kvstore/listen.h"

namespace certkv::cluster {
namespace {

namespace asio = boost::asio;
using Tcp = asio::ip::tcp;
using ErrorCode = boost::system::error_code;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kConnectLimit{2000};
constexpr milliseconds kIdleLimit{5000};  // an authenticated peer beats five times a second
constexpr milliseconds kFirstPause{50}, kLastPause{1000};
constexpr size_t kMaxQueued = 256;

}  // namespace

struct ClusterNode::State : std::enable_shared_from_this<State> {
  State(asio::io_context& i, const JobKey& k, ClusterOptions o, ClusterCallbacks c)
      : io(i),
        options(std::move(o)),
        callbacks(std::move(c)),
        acceptor(io),
        ticker(io),
        accept_pause(io) {
    check_seeds(options.seeds);
    const auto own = std::find_if(options.seeds.begin(), options.seeds.end(),
                                  [this](const Seed& s) { return s.name == options.name; });
    CERTKV_EXPECT(own != options.seeds.end(), InvalidArgument,
                  "node '{}' does not stand in the seed list of {} nodes", options.name,
                  options.seeds.size());
    self = NodeId(own - options.seeds.begin());
    for (const Seed& s : options.seeds) {
      addresses.push_back(split_address(s.address, "seed " + s.name));
      peers.emplace_back(io);
    }
    if (options.listen.empty()) options.listen = own->address;
    while (boot == 0) boot = random_u64();
    identity.emplace(
        ChannelIdentity{k, self, boot, seeds_digest(options.seeds), options.seeds.size()});
    member.emplace(options.seeds.size(), self, boot, now(), options.timing);
  }

  void accept();
  void start();
  void tick();
  void dial(NodeId n);
  void dial_later(NodeId n);
  void connected(NodeId n, Tcp::socket socket);
  void adopt(NodeId n, const std::shared_ptr<Link>& link);
  void ended(NodeId n, const Link* link);
  void flush();  // sends what the membership wants sent, tells of what happened
  void publish();
  void stop();
  Time now() const {
    return std::chrono::duration_cast<Time>(Clock::now() - origin) + Time(1'000'000);
  }

  struct Peer {
    explicit Peer(asio::io_context& i) : pause(i) {}
    std::shared_ptr<Link> link;  // authenticated
    asio::steady_timer pause;
    milliseconds next_pause = kFirstPause;
    bool dialling = false;
  };

  asio::io_context& io;
  ClusterOptions options;
  ClusterCallbacks callbacks;
  Tcp::acceptor acceptor;
  asio::steady_timer ticker, accept_pause;
  const Clock::time_point origin = Clock::now();
  NodeId self = 0;
  uint64_t boot = 0;
  std::optional<ChannelIdentity> identity;
  std::vector<HostPort> addresses;
  std::deque<Peer> peers;
  std::list<std::shared_ptr<Link>> strangers;  // oldest first
  std::optional<Membership> member;
  Output output;
  bool stopped = false, flushing = false;
  mutable std::mutex mutex;  // guards `shown`
  ClusterSnapshot shown;
  ClusterSnapshot counts;  // the counters, on the io thread
};

// One connection: its socket, its limits, and what waits to be sent.
class ClusterNode::Link : public std::enable_shared_from_this<Link> {
 public:
  // dialled: to whom; none for a connection that came in.
  Link(std::shared_ptr<State> state, Tcp::socket socket, std::optional<NodeId> dialled)
      : state_(std::move(state)),
        socket_(std::move(socket)),
        timer_(state_->io),
        dialled_(dialled.has_value()),
        channel_(*state_->identity, dialled) {
    ErrorCode ignored;
    socket_.set_option(Tcp::no_delay(true), ignored);
    socket_.non_blocking(true, ignored);
    close_on_exec(socket_.native_handle());
  }

  void start() {
    limit(state_->options.handshake);
    if (dialled_) {
      channel_.greet(out_);
      push();
    }
    read_header();
  }

  void send(const Message& m) {
    if (queue_.size() >= kMaxQueued) return;  // it does not read: its silence will be noticed
    channel_.seal(m, out_);
    push();
  }

  void close(const std::string& why, bool rejected = false) {
    if (std::exchange(closed_, true)) return;
    const auto self = shared_from_this();
    timer_.cancel();
    ErrorCode ignored;
    socket_.close(ignored);
    state_->strangers.remove(self);
    if (rejected) {
      ++state_->counts.rejected;
    } else if (!dialled_ && !channel_.authenticated()) {
      ++state_->counts.strangers_dropped;
    }
    if (state_->stopped) return;
    log_debug("cluster: a connection {} {} ended: {}", dialled_ ? "to" : "from",
              channel_.authenticated() || dialled_ ? state_->options.seeds[*channel_.peer()].name
                                                   : "a stranger",
              why);
    if (channel_.peer()) state_->ended(*channel_.peer(), this);
  }

 private:
  void limit(milliseconds d) {
    timer_.expires_after(d * kDeadlineFactor);
    timer_.async_wait([self = shared_from_this()](ErrorCode error) {
      // A timer that had fired already when it was set anew comes here without an error.
      if (error || self->timer_.expiry() > Clock::now()) return;
      self->close(self->channel_.authenticated() ? "no whole frame within 5 s"
                                                 : "no handshake in time");
    });
  }
  void read_header() {
    asio::async_read(socket_, asio::buffer(&frame_, sizeof frame_),
                     [self = shared_from_this()](ErrorCode error, size_t) {
                       if (self->closed_) return;
                       if (error) return self->close(error.message());
                       if (const char* defect = self->channel_.defect(self->frame_))
                         return self->close(defect, true);
                       self->read_payload();
                     });
  }
  void read_payload() {
    if (frame_.payload_bytes == 0) return handle();
    asio::async_read(socket_, asio::buffer(payload_.data(), frame_.payload_bytes),
                     [self = shared_from_this()](ErrorCode error, size_t) {
                       if (self->closed_) return;
                       if (error) return self->close(error.message());
                       self->handle();
                     });
  }
  void handle() {
    const bool stranger = !channel_.authenticated();
    std::optional<Message> message;
    const char* wrong =
        channel_.take(frame_, {payload_.data(), frame_.payload_bytes}, out_, message);
    push();
    if (wrong != nullptr) return close(wrong, true);
    if (channel_.authenticated()) {
      ++state_->counts.frames_in;
      limit(kIdleLimit);
      if (stranger) {
        state_->strangers.remove(shared_from_this());
        state_->adopt(*channel_.peer(), shared_from_this());
      }
    }
    if (message) {
      state_->member->receive(*message, state_->now(), state_->output);
      state_->flush();
    }
    if (!closed_) read_header();
  }
  void push() {
    if (out_.empty() || closed_) return;
    queue_.push_back(std::exchange(out_, {}));
    if (queue_.size() == 1) write();
  }
  void write() {
    asio::async_write(socket_, asio::buffer(queue_.front()),
                      [self = shared_from_this()](ErrorCode error, size_t) {
                        if (self->closed_) return;
                        if (error) return self->close(error.message());
                        ++self->state_->counts.frames_out;
                        self->queue_.pop_front();
                        if (!self->queue_.empty()) self->write();
                      });
  }

  const std::shared_ptr<State> state_;
  Tcp::socket socket_;
  asio::steady_timer timer_;
  const bool dialled_;
  Channel channel_;
  ClusterFrame frame_;
  std::array<std::byte, kMaxMessageBytes> payload_{};
  Channel::Bytes out_;
  std::deque<Channel::Bytes> queue_;
  bool closed_ = false;
};

void ClusterNode::State::accept() {
  acceptor.async_accept([s = shared_from_this()](ErrorCode error, Tcp::socket socket) {
    if (s->stopped) return;
    if (error) {  // out of descriptors, most likely: later, instead of spinning
      s->accept_pause.expires_after(kFirstPause);
      return s->accept_pause.async_wait([s](ErrorCode) {
        if (!s->stopped) s->accept();
      });
    }
    if (s->strangers.size() >= s->options.max_strangers)
      s->strangers.front()->close("a newer stranger needs its place");
    const auto link = std::make_shared<Link>(s, std::move(socket), std::nullopt);
    s->strangers.push_back(link);
    link->start();
    s->accept();
  });
}

void ClusterNode::State::start() {
  acceptor = listen_on(io, options.listen, "node " + options.name + ", control address");
  accept();
  for (NodeId n = 0; n < self; ++n) dial(n);
  tick();
}

void ClusterNode::State::tick() {
  if (stopped) return;
  member->tick(now(), output);
  flush();
  publish();
  const Time wait = std::max(member->next_tick() - now(), Time(1000));
  ticker.expires_after(wait);
  ticker.async_wait([s = shared_from_this()](ErrorCode error) {
    if (!error) s->tick();
  });
}

void ClusterNode::State::dial(NodeId n) {
  Peer& p = peers[n];
  if (stopped || p.dialling || p.link) return;
  p.dialling = true;
  ++counts.dials;
  struct Attempt {
    explicit Attempt(asio::io_context& i) : resolver(i), socket(i), limit(i) {}
    Tcp::resolver resolver;
    Tcp::socket socket;
    asio::steady_timer limit;
    bool done = false;
  };
  const auto a = std::make_shared<Attempt>(io);
  const auto failed = [s = shared_from_this(), a, n](ErrorCode error) {
    if (std::exchange(a->done, true)) return;
    a->limit.cancel();
    ErrorCode ignored;
    a->socket.close(ignored);
    a->resolver.cancel();
    s->peers[n].dialling = false;
    if (s->stopped) return;
    if (error == asio::error::connection_refused) {
      s->member->refused(n, s->now(), s->output);
      s->flush();
    }
    s->dial_later(n);
  };
  a->limit.expires_after(kConnectLimit * kDeadlineFactor);
  a->limit.async_wait([failed](ErrorCode error) {
    if (!error) failed(asio::error::timed_out);
  });
  a->resolver.async_resolve(addresses[n].host, addresses[n].port,
                            [s = shared_from_this(), a, n, failed](
                                ErrorCode error, const Tcp::resolver::results_type& r) {
                              if (error || a->done || r.empty())
                                return failed(error ? error : asio::error::host_not_found);
                              a->socket.async_connect(r.begin()->endpoint(),
                                                      [s, a, n, failed](ErrorCode e) {
                                                        if (e || a->done) return failed(e);
                                                        a->done = true;
                                                        a->limit.cancel();
                                                        s->connected(n, std::move(a->socket));
                                                      });
                            });
}

void ClusterNode::State::dial_later(NodeId n) {
  Peer& p = peers[n];
  if (stopped || n >= self) return;
  p.pause.expires_after(p.next_pause);
  p.next_pause = std::min(2 * p.next_pause, kLastPause);
  p.pause.async_wait([s = shared_from_this(), n](ErrorCode error) {
    if (!error) s->dial(n);
  });
}

void ClusterNode::State::connected(NodeId n, Tcp::socket socket) {
  if (stopped) return;
  std::make_shared<Link>(shared_from_this(), std::move(socket), n)->start();
}

void ClusterNode::State::adopt(NodeId n, const std::shared_ptr<Link>& link) {
  Peer& p = peers[n];
  p.dialling = false;
  p.next_pause = kFirstPause;
  const auto former = std::exchange(p.link, link);
  if (former) former->close("a newer connection to the same node");
}

void ClusterNode::State::ended(NodeId n, const Link* link) {
  Peer& p = peers[n];
  if (p.link.get() == link) {
    p.link.reset();
    member->refused(n, now(), output);  // its process is gone, or will be heard again in a moment
    flush();
  }
  if (!p.link) {
    p.dialling = false;
    dial_later(n);
  }
}

void ClusterNode::State::flush() {
  if (std::exchange(flushing, true)) return;  // a callback or a send came back here
  while (!output.messages.empty() || !output.events.empty()) {
    const Output out = std::exchange(output, {});
    for (const Message& m : out.messages)
      if (const auto link = peers[m.to].link) link->send(m);
    for (const Event& e : out.events) {
      switch (e.kind) {
        case Event::Kind::Installed:
          ++counts.views;
          [[fallthrough]];
        case Event::Kind::Active:
        case Event::Kind::Fenced:
          log_info("cluster: {} in view {:#x} of {} members", event_name(e.kind), e.epoch,
                   member->view().members.count());
          if (callbacks.on_view) callbacks.on_view(member->view(), member->active(now()));
          break;
        case Event::Kind::PeerUp:
        case Event::Kind::PeerDown:
          log_info("cluster: {} {}", options.seeds[e.node].name, event_name(e.kind));
          if (callbacks.on_peer) callbacks.on_peer(e.node, member->peer(e.node, now()));
          break;
      }
    }
  }
  flushing = false;
}

void ClusterNode::State::publish() {
  ClusterSnapshot s = counts;
  const Time t = now();
  const View& v = member->view();
  s.epoch = v.epoch;
  s.active = member->active(t);
  for (size_t n = 0; n < options.seeds.size(); ++n) {
    const PeerState p = member->peer(NodeId(n), t);
    ClusterNodeState& node = s.nodes.emplace_back();
    node.name = options.seeds[n].name;
    node.address = options.seeds[n].address;
    node.self = n == self;
    node.alive = node.self || p.alive;
    node.boot = node.self ? boot : p.boot;
    node.member = v.admits(NodeId(n), node.boot);
    node.epoch = node.self ? v.epoch : p.epoch;
    node.lag_bytes = node.self ? member->local().lag_bytes : p.lag_bytes;
    node.free_bytes = node.self ? member->local().free_bytes : p.free_bytes;
    node.data_address = node.self ? member->local().data_address : p.data_address;
    if (node.self || p.last_heard != Time(0))
      node.silent =
          node.self ? milliseconds(0) : std::chrono::duration_cast<milliseconds>(t - p.last_heard);
  }
  const std::lock_guard lock(mutex);
  shown = std::move(s);
}

void ClusterNode::State::stop() {
  if (std::exchange(stopped, true)) return;
  ErrorCode ignored;
  acceptor.close(ignored);
  ticker.cancel();
  accept_pause.cancel();
  for (const auto& link : std::list(strangers)) link->close("the node ends");
  for (Peer& p : peers) {
    p.pause.cancel();
    if (const auto link = std::exchange(p.link, nullptr)) link->close("the node ends");
  }
}

ClusterNode::ClusterNode(asio::io_context& io, const JobKey& key, ClusterOptions options,
                         ClusterCallbacks callbacks)
    : state_(std::make_shared<State>(io, key, std::move(options), std::move(callbacks))) {
  state_->start();
}

ClusterNode::~ClusterNode() {
  state_->stop();
}

ClusterSnapshot ClusterNode::snapshot() const {
  const std::lock_guard lock(state_->mutex);
  return state_->shown;
}

void ClusterNode::set_local(const LocalState& local) {
  check_local_state(local);  // here, where somebody can catch it
  asio::post(state_->io, [s = state_, local] { s->member->set_local(local); });
}

void ClusterNode::stop() {
  asio::post(state_->io, [s = state_] { s->stop(); });
}

const Membership& ClusterNode::membership() const {
  return *state_->member;
}
Time ClusterNode::now() const {
  return state_->now();
}
NodeId ClusterNode::self() const {
  return state_->self;
}
uint16_t ClusterNode::port() const {
  return state_->acceptor.local_endpoint().port();
}

}  // namespace certkv::cluster
