#include "parallel/ucx_worker.h"

#include <netdb.h>

#include <algorithm>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/base/log.h"

namespace certkv {
namespace {

constexpr unsigned kMessage = 7;  // id of our active message
constexpr size_t kMaxInbox = 512;
constexpr std::chrono::milliseconds kStrangerTime{5000};
constexpr std::chrono::milliseconds kPaused{1000};  // a tick this late: this process was stopped
constexpr std::chrono::milliseconds kCloseTime{1000};
constexpr size_t kTaggedBytes = offsetof(WireHeader, tag);

std::span<const std::byte> tagged(const WireHeader& h) {
  return {reinterpret_cast<const std::byte*>(&h), kTaggedBytes};
}

}  // namespace

// ---- setting up ---------------------------------------------------------------------------------

UcxWorker::UcxWorker(const JobKey& key, const TransportOptions& options, ucp_context_h context,
                     WindowPool pool)
    : key_(key), options_(options), pool_(std::move(pool)), context_(context) {
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucs_status_t status = ucp_worker_create(context_, &params, &worker_);
  CERTKV_EXPECT(status == UCS_OK, CommError, "UCX makes no worker: {}", ucx_text(status));
  const auto expect_ok = [&](ucs_status_t s, const char* what) {
    if (s == UCS_OK) return;
    if (memory_ != nullptr) ucp_mem_unmap(context_, memory_);
    ucp_worker_destroy(worker_);
    CERTKV_THROW(CommError, "UCX {}: {}", what, ucx_text(s));
  };
  expect_ok(ucp_worker_get_efd(worker_, &descriptor_), "gives no descriptor to wait on");
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kMessage;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  handler.cb = on_message;
  handler.arg = this;
  expect_ok(ucp_worker_set_am_recv_handler(worker_, &handler), "takes no message handler");
  ucp_mem_map_params_t map{};
  map.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  map.address = pool_.slab().data();
  map.length = pool_.slab().size();
  expect_ok(ucp_mem_map(context_, &map, &memory_), "does not register the windows");
  last_tick_ = next_tick_ = Clock::now();
}

UcxWorker::~UcxWorker() {
  close("the transport was closed");
  const auto until = Clock::now() + kCloseTime;
  while ((!closing_.empty() || !sends_.empty()) && Clock::now() < until) {
    ucp_worker_progress(worker_);
    std::erase_if(closing_, [](void* request) {
      if (ucp_request_check_status(request) == UCS_INPROGRESS) return false;
      ucp_request_free(request);
      return true;
    });
  }
  if (listener_ != nullptr) ucp_listener_destroy(listener_);
  ucp_mem_unmap(context_, memory_);
  ucp_worker_destroy(worker_);  // whatever still hangs ends here; its memory goes after it
}

uint16_t UcxWorker::listen(const std::string& host, uint16_t port) {
  addrinfo hints{};
  hints.ai_flags = AI_PASSIVE;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  CERTKV_EXPECT(error == 0 && found != nullptr, InvalidArgument, "listening at {}:{}: {}", host,
                port, gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  ucp_listener_params_t params{};
  params.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
  params.sockaddr = {found->ai_addr, found->ai_addrlen};
  params.conn_handler = {on_connection, this};
  const ucs_status_t status = ucp_listener_create(worker_, &params, &listener_);
  CERTKV_EXPECT(status == UCS_OK, InvalidArgument, "listening at {}:{}: {} (is the port in use?)",
                host, port, ucx_text(status));
  ucp_listener_attr_t attributes{};
  attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
  CERTKV_EXPECT(ucp_listener_query(listener_, &attributes) == UCS_OK, CommError,
                "UCX does not tell the port that it listens at");
  const auto* a = reinterpret_cast<const sockaddr_in*>(&attributes.sockaddr);
  static_assert(offsetof(sockaddr_in, sin_port) == offsetof(sockaddr_in6, sin6_port));
  return ntohs(a->sin_port);
}

ucp_ep_h UcxWorker::make_endpoint(ucp_ep_params_t& params, ucs_status_t& status) {
  params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = {on_error, this};
  ucp_ep_h ep = nullptr;
  status = ucp_ep_create(worker_, &params, &ep);
  return status == UCS_OK ? ep : nullptr;
}

UcxWorker::Connection& UcxWorker::add(uint64_t number, std::shared_ptr<PeerInfo> info,
                                      ucp_ep_h ep) {
  Connection& c = connections_[number];
  c.number = number;
  do {
    random_bytes(std::as_writable_bytes(std::span(&c.id, 1)));
  } while (c.id == 0 || by_id_.contains(c.id));
  by_id_[c.id] = number;
  by_endpoint_[ep] = number;
  random_bytes(c.nonce);
  c.ep = ep;
  c.info = std::move(info);
  c.heard = c.sent = c.begun = Clock::now();
  return c;
}

void UcxWorker::connect(uint64_t number, std::shared_ptr<PeerInfo> info, const sockaddr* address,
                        socklen_t length) {
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
  params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
  params.sockaddr = {address, length};
  ucs_status_t status = UCS_OK;
  const ucp_ep_h ep = make_endpoint(params, status);
  if (ep == nullptr) return info->lose(ucx_text(status));
  Connection& c = add(number, std::move(info), ep);
  c.client = true;
  const WireGreeting greeting{c.nonce, c.id};
  const auto body = std::as_bytes(std::span(&greeting, 1));
  WireHeader header;
  header.kind = uint16_t(WireKind::Hello);
  send(c, header, {}, {body.begin(), body.end()}, body.size());
}

// ---- callbacks: they note, and do nothing else --------------------------------------------------

void UcxWorker::on_connection(ucp_conn_request_h request, void* self) {
  static_cast<UcxWorker*>(self)->arrivals_.push_back(request);
}

void UcxWorker::on_error(void* self, ucp_ep_h ep, ucs_status_t status) {
  auto& w = *static_cast<UcxWorker*>(self);
  const auto it = w.by_endpoint_.find(ep);
  if (it == w.by_endpoint_.end()) return;
  Connection& c = w.connections_.at(it->second);
  if (c.failed.empty()) c.failed = ucx_text(status);
}

void UcxWorker::on_sent(void* request, ucs_status_t, void* outgoing) {
  auto* out = static_cast<Outgoing*>(outgoing);
  ucp_request_free(request);
  out->worker->sends_.erase(out->place);  // an error of the send is one of its endpoint as well
}

void UcxWorker::on_received(void* request, ucs_status_t status, size_t bytes, void* incoming) {
  auto* in = static_cast<Incoming*>(incoming);
  ucp_request_free(request);
  in->complete = true;
  in->status = status == UCS_OK && bytes != in->body.size() ? UCS_ERR_MESSAGE_TRUNCATED : status;
  in->worker->receives_.erase(in->place);
}

ucs_status_t UcxWorker::on_message(void* self, const void* header, size_t header_bytes, void* data,
                                   size_t bytes, const ucp_am_recv_param_t* param) {
  WireHeader h;
  if (header_bytes != sizeof h) return UCS_OK;  // dropped
  std::memcpy(static_cast<void*>(&h), header, sizeof h);
  if (h.magic != kWireMagic || h.format != kWireFormat || h.body_bytes != bytes) return UCS_OK;
  auto& w = *static_cast<UcxWorker*>(self);
  try {
    if (h.kind == uint16_t(WireKind::Hello)) return w.take_hello(h, data, bytes, param);
    return w.take(h, data, bytes, param);
  } catch (const std::exception& e) {  // memory, at worst: nothing may pass through UCX's frames
    log_warning("a message was dropped: {}", e.what());
    return UCS_OK;
  }
}

ucs_status_t UcxWorker::take_hello(const WireHeader&, const void* data, size_t bytes,
                                   const ucp_am_recv_param_t* param) {
  const bool eager = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  const bool has_end = (param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0;
  if (!eager || !has_end || bytes != sizeof(WireGreeting) ||
      hellos_.size() >= options_.limits.connections) {
    return UCS_OK;
  }
  WireGreeting greeting;
  std::memcpy(&greeting, data, sizeof greeting);
  hellos_.emplace_back(param->reply_ep, greeting);
  return UCS_OK;
}

ucs_status_t UcxWorker::take(const WireHeader& h, void* data, size_t bytes,
                             const ucp_am_recv_param_t* param) {
  const auto found = by_id_.find(h.connection);
  if (found == by_id_.end()) return UCS_OK;
  Connection& c = connections_.at(found->second);
  if (!c.failed.empty()) return UCS_OK;
  const bool eager = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) == 0;
  const auto refuse = [&](const char* why) {
    c.failed = why;
    return UCS_OK;
  };
  if (c.inbox.size() >= kMaxInbox) return refuse("it sent more than was asked for");
  if (h.sequence < (c.session ? c.session->next_to_open() : 0) || c.inbox.contains(h.sequence)) {
    return refuse("it repeated a sequence number");
  }
  auto in = std::make_shared<Incoming>();
  in->header = h;
  in->worker = this;
  switch (WireKind(h.kind)) {
    case WireKind::Welcome:
      if (!c.client || c.session || bytes != sizeof(WireGreeting) || !eager) {
        return refuse("it greeted out of turn");
      }
      break;
    case WireKind::Heartbeat:
      if (bytes != 0) return refuse("it sent a heartbeat with a body");
      break;
    case WireKind::Request:
      // Only rendezvous waits for room, so a stranger has none.
      if (bytes > options_.limits.request_bytes || (!eager && !c.established)) {
        return refuse("it sent a request that is too long");
      }
      break;
    case WireKind::Reply: {
      const auto call = c.calls.find(h.call);
      if (call == c.calls.end() || call->second.arriving) {
        return refuse("it answered what was not asked");
      }
      in->call = call->second.state;
      if (bytes > in->call->window.bytes().size()) {
        return refuse("it sent a reply that is too long");
      }
      call->second.arriving = true;
      in->body = in->call->window.bytes().first(bytes);
      break;
    }
    default:
      return refuse("it sent an unknown kind of message");
  }
  c.heard = Clock::now();
  if (!eager) {
    in->descriptor = data;
    c.inbox[h.sequence] = std::move(in);
    return UCS_INPROGRESS;  // kept until start_receive or lose
  }
  if (in->call == nullptr) {
    if (bytes > 4096) in->window = pool_.take(bytes);
    if (!in->window) in->bytes.resize(bytes);
    in->body = in->window ? in->window.bytes() : std::span(in->bytes);
  }
  if (bytes > 0) std::memcpy(in->body.data(), data, bytes);
  in->complete = true;
  c.inbox[h.sequence] = std::move(in);
  return UCS_OK;
}

// ---- sending ------------------------------------------------------------------------------------

void UcxWorker::send(Connection& c, WireHeader header, Window window, std::vector<std::byte> bytes,
                     size_t body_bytes) {
  auto owned = std::make_unique<Outgoing>();
  Outgoing& out = *owned;
  out.worker = this;
  out.window = std::move(window);
  out.bytes = std::move(bytes);
  const std::span<const std::byte> body =
      out.window ? std::span<const std::byte>(out.window.bytes().first(body_bytes))
                 : std::span<const std::byte>(out.bytes);
  header.body_bytes = body.size();
  header.connection = c.remote;
  if (c.session != nullptr) {
    header.sequence = c.session->next_to_send();
    const SecureSession::Part parts[] = {tagged(header), body};
    header.tag = c.session->seal(parts);
  }
  out.header = header;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                       UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  param.cb.send = on_sent;
  param.user_data = &out;
  param.flags = body.size() > kEagerBytes ? UCP_AM_SEND_FLAG_RNDV : UCP_AM_SEND_FLAG_EAGER;
  if (header.kind == uint16_t(WireKind::Hello)) param.flags |= UCP_AM_SEND_FLAG_REPLY;
  out.place = sends_.insert(sends_.end(), std::move(owned));
  c.sent = Clock::now();
  const ucs_status_ptr_t request = ucp_am_send_nbx(c.ep, kMessage, &out.header, sizeof out.header,
                                                   body.data(), body.size(), &param);
  if (UCS_PTR_IS_PTR(request)) return;
  if (UCS_PTR_IS_ERR(request) && c.failed.empty()) c.failed = ucx_text(UCS_PTR_STATUS(request));
  sends_.erase(out.place);
}

void UcxWorker::call(uint64_t number, uint32_t op, Window request,
                     std::shared_ptr<CallState> state) {
  const auto it = connections_.find(number);
  if (it == connections_.end()) {
    state->end(CallStatus::PeerLost, 0, "no such connection");
    return;
  }
  Connection& c = it->second;
  if (c.calls.size() >= options_.limits.calls) {
    state->end(CallStatus::Busy, 0, "too many calls are under way on this connection");
    return;
  }
  WireHeader header;
  header.kind = uint16_t(WireKind::Request);
  header.call = next_call_++;
  header.op = op;
  header.deadline_ms =
      uint32_t(std::clamp<int64_t>(state->deadline.left().count(), 1, int64_t(1) << 31));
  header.reply_limit = state->window.bytes().size();
  c.calls[header.call] = {std::move(state), false};
  const size_t bytes = request.bytes().size();
  send(c, header, std::move(request), {}, bytes);
}

void UcxWorker::answer(uint64_t number, uint64_t call, CallStatus status, Window reply,
                       size_t bytes) {
  const auto it = connections_.find(number);
  if (it == connections_.end()) return;
  WireHeader header;
  header.kind = uint16_t(WireKind::Reply);
  header.call = call;
  header.op = uint32_t(status);
  send(it->second, header, std::move(reply), {}, bytes);
}

// ---- turns --------------------------------------------------------------------------------------

void UcxWorker::accept_all() {
  for (const ucp_conn_request_h request : std::exchange(arrivals_, {})) {
    if (connections_.size() >= options_.limits.connections ||
        strangers() >= options_.limits.strangers) {
      log_warning("a connection was turned away: {} are open, {} of them strangers",
                  connections_.size(), strangers());
      ucp_listener_reject(listener_, request);
      continue;
    }
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST;
    params.conn_request = request;
    ucs_status_t status = UCS_OK;
    const ucp_ep_h ep = make_endpoint(params, status);
    if (ep == nullptr) {
      log_warning("a connection could not be taken: {}", ucx_text(status));
      continue;
    }
    auto info = std::make_shared<PeerInfo>();
    add(on_accept(info), info, ep);
  }
  for (const auto& [ep, greeting] : std::exchange(hellos_, {})) {
    const auto it = by_endpoint_.find(ep);
    if (it == by_endpoint_.end()) continue;
    Connection& c = connections_.at(it->second);
    if (c.client || c.session || greeting.connection == 0) {
      lose(c.number, "it greeted out of turn");
      continue;
    }
    c.remote = greeting.connection;
    const uint64_t ids[] = {c.remote, c.id};
    c.session = std::make_unique<SecureSession>(key_, SecureSession::Role::Server, greeting.nonce,
                                                c.nonce, std::as_bytes(std::span(ids)));
    const WireGreeting mine{c.nonce, c.id};
    const auto body = std::as_bytes(std::span(&mine, 1));
    WireHeader header;
    header.kind = uint16_t(WireKind::Welcome);
    send(c, header, {}, {body.begin(), body.end()}, body.size());
  }
}

void UcxWorker::start_receive(Connection& c, const std::shared_ptr<Incoming>& in) {
  if (in->call == nullptr) {
    in->window = pool_.take(in->header.body_bytes);
    if (!in->window) return;  // it waits in its sender until there is room
    in->body = in->window.bytes();
  }
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  param.cb.recv_am = on_received;
  param.user_data = in.get();
  void* descriptor = std::exchange(in->descriptor, nullptr);
  in->place = receives_.insert(receives_.end(), in);
  const ucs_status_ptr_t request =
      ucp_am_recv_data_nbx(worker_, descriptor, in->body.data(), in->body.size(), &param);
  if (UCS_PTR_IS_PTR(request)) return;
  receives_.erase(in->place);
  in->complete = true;
  in->status = UCS_PTR_STATUS(request);
  if (in->status != UCS_OK && c.failed.empty()) c.failed = ucx_text(in->status);
}

// True where something was done. The connection may be gone afterwards.
bool UcxWorker::move(Connection& c) {
  if (!c.failed.empty()) {
    lose(c.number, std::string(c.failed));
    return true;
  }
  for (const auto& [sequence, in] : c.inbox) {
    if (in->descriptor != nullptr) start_receive(c, in);
  }
  bool moved = false;
  const uint64_t number = c.number;
  while (!c.inbox.empty() && c.inbox.begin()->second->complete) {
    if (!c.session && !c.client) return moved;  // before its hello was seen
    const uint64_t next = c.session ? c.session->next_to_open() : 0;
    if (c.inbox.begin()->first != next) break;
    const std::shared_ptr<Incoming> in = c.inbox.begin()->second;
    c.inbox.erase(c.inbox.begin());
    moved = true;
    if (in->status != UCS_OK || !authentic(c, *in)) {
      lose(number, in->status != UCS_OK ? ucx_text(in->status)
                   : c.established      ? "a message of it was not authentic"
                                        : "it has another key or version of certkv");
      return true;
    }
    if (!c.established) {
      c.established = true;
      const std::lock_guard lock(c.info->mutex);
      c.info->established = true;
      c.info->changed.notify_all();
    }
    dispatch(c, *in);
    if (!connections_.contains(number)) return true;
  }
  return moved;
}

bool UcxWorker::authentic(Connection& c, Incoming& in) {
  if (!c.session && !greet(c, in)) return false;
  const SecureSession::Part parts[] = {tagged(in.header), in.body};
  return c.session->open(in.header.sequence, parts, in.header.tag);
}

bool UcxWorker::greet(Connection& c, const Incoming& in) {
  if (WireKind(in.header.kind) != WireKind::Welcome) return false;
  WireGreeting greeting;
  std::memcpy(&greeting, in.body.data(), sizeof greeting);
  c.remote = greeting.connection;
  const uint64_t ids[] = {c.id, c.remote};
  c.session = std::make_unique<SecureSession>(key_, SecureSession::Role::Client, c.nonce,
                                              greeting.nonce, std::as_bytes(std::span(ids)));
  return c.remote != 0;
}

void UcxWorker::dispatch(Connection& c, Incoming& in) {
  const WireHeader& h = in.header;
  WireHeader header;
  switch (WireKind(h.kind)) {
    case WireKind::Hello:
    case WireKind::Heartbeat:
      return;
    case WireKind::Welcome:
      header.kind = uint16_t(WireKind::Heartbeat);  // shows that this end has the key
      return send(c, header, {}, {}, 0);
    case WireKind::Reply: {
      c.calls.erase(h.call);
      const auto status = CallStatus(h.op);
      const char* text = reinterpret_cast<const char*>(in.body.data());
      if (status == CallStatus::Ok) {
        in.call->end(CallStatus::Ok, in.body.size(), {});
      } else if (status == CallStatus::Refused || status == CallStatus::Busy ||
                 status == CallStatus::TooLarge) {
        in.call->end(status, 0, std::string(text, std::min(in.body.size(), kMaxRefusalBytes)));
      } else {
        in.call->end(CallStatus::PeerLost, 0, "it answered with an unknown status");
        lose(c.number, "it answered with an unknown status");
      }
      return;
    }
    case WireKind::Request: {
      HandlerTask task;
      task.from = {c.number};
      task.op = h.op;
      task.body = in.body;
      task.window = std::move(in.window);
      task.bytes = std::move(in.bytes);
      task.reply_limit = size_t(std::min<uint64_t>(h.reply_limit, options_.limits.reply_bytes));
      task.deadline = Deadline::at(Clock::now() + std::chrono::milliseconds(h.deadline_ms));
      task.call = h.call;
      if (!on_request(std::move(task))) {
        answer(c.number, h.call, CallStatus::Busy, {}, 0);
      }
      return;
    }
  }
}

bool UcxWorker::turn() {
  bool busy = false;
  for (int i = 0; i < 64 && ucp_worker_progress(worker_) != 0; ++i) busy = true;
  if (!arrivals_.empty() || !hellos_.empty()) {
    accept_all();
    busy = true;
  }
  for (auto it = connections_.begin(); it != connections_.end();) {
    Connection& c = (it++)->second;  // it may be erased
    if (!c.failed.empty() || !c.inbox.empty()) busy = move(c) || busy;
  }
  std::erase_if(closing_, [](void* request) {
    if (ucp_request_check_status(request) == UCS_INPROGRESS) return false;
    ucp_request_free(request);
    return true;
  });
  if (Clock::now() >= next_tick_) tick();
  return busy;
}

bool UcxWorker::arm() {
  const ucs_status_t status = ucp_worker_arm(worker_);
  return status == UCS_OK;
}

void UcxWorker::tick() {
  const auto now = Clock::now();
  const bool was_stopped = now - last_tick_ > options_.heartbeat + kPaused;
  last_tick_ = now;
  next_tick_ = now + options_.heartbeat / 4 + std::chrono::milliseconds(1);
  std::vector<std::pair<uint64_t, std::string>> lost;
  for (auto& [number, c] : connections_) {
    if (was_stopped) c.heard = now;  // silent were we, not the peer
    if (!c.established && now - c.begun > kStrangerTime * kDeadlineFactor) {
      lost.emplace_back(number, "it did not authenticate in time");
    } else if (c.established && now - c.heard > options_.silence * kDeadlineFactor) {
      lost.emplace_back(number, fmt::format("no sign of life for {} ms", options_.silence.count()));
    } else if (c.established && now - c.sent >= options_.heartbeat) {
      WireHeader header;
      header.kind = uint16_t(WireKind::Heartbeat);
      send(c, header, {}, {}, 0);
    }
  }
  for (const auto& [number, why] : lost) lose(number, why);
}

size_t UcxWorker::strangers() const {
  return size_t(std::count_if(connections_.begin(), connections_.end(),
                              [](const auto& c) { return !c.second.established; }));
}

// ---- ending -------------------------------------------------------------------------------------

void UcxWorker::close_endpoint(ucp_ep_h ep) {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(ep, &param);
  if (UCS_PTR_IS_PTR(request)) closing_.push_back(request);
}

void UcxWorker::lose(uint64_t number, const std::string& why) {
  const auto it = connections_.find(number);
  if (it == connections_.end()) return;
  Connection& c = it->second;
  log_debug("connection {} ends: {}", number, why);
  c.info->lose(why);  // first: whoever sees a call end must not take the connection for alive
  for (auto& [id, call] : c.calls) call.state->end(CallStatus::PeerLost, 0, why);
  for (auto& [sequence, in] : c.inbox) {
    if (in->descriptor != nullptr) ucp_am_data_release(worker_, in->descriptor);
  }
  by_id_.erase(c.id);
  by_endpoint_.erase(c.ep);
  const ucp_ep_h ep = c.ep;
  connections_.erase(it);
  close_endpoint(ep);
}

void UcxWorker::close(const std::string& why) {
  while (!connections_.empty()) lose(connections_.begin()->first, why);
}

}  // namespace certkv
