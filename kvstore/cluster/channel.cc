#include "kvstore/cluster/channel.h"

#include <cstring>

namespace certkv::cluster {
namespace {

std::span<const std::byte> tagged_head(const ClusterFrame& f) {
  return std::as_bytes(std::span<const ClusterFrame, 1>(&f, 1)).first(offsetof(ClusterFrame, tag));
}

void append(const ClusterFrame& f, std::span<const std::byte> payload, Channel::Bytes& out) {
  const size_t at = out.size();
  out.resize(at + sizeof f + payload.size());
  std::memcpy(out.data() + at, &f, sizeof f);
  if (!payload.empty()) std::memcpy(out.data() + at + sizeof f, payload.data(), payload.size());
}

}  // namespace

Channel::Channel(const ChannelIdentity& identity, std::optional<NodeId> dialled)
    : own_(identity), dialled_(dialled.has_value()), peer_(dialled) {
  random_bytes(nonce_);
}

void Channel::greet(Bytes& out) {
  ClusterHello h;
  h.from = own_.self;
  h.to = *peer_;
  h.boot = own_.boot;
  h.seeds = own_.digest;
  h.nonce = nonce_;
  ClusterFrame f;
  f.kind = uint8_t(FrameKind::Hello);
  f.payload_bytes = sizeof h;
  append(f, std::as_bytes(std::span<const ClusterHello, 1>(&h, 1)), out);
}

const char* Channel::hello_defect() const {
  if (hello_.reserved != 0 || hello_.reserved1 != 0) return "a reserved field is not zero";
  if (hello_.seeds != own_.digest) return "another seed list";
  if (hello_.to != own_.self) return "it wants another node";
  if (hello_.boot == 0 || hello_.boot == own_.boot) return "a boot nonce that cannot be";
  if (dialled_) return hello_.from == *peer_ ? nullptr : "another node answered";
  return hello_.from > own_.self && hello_.from < own_.seeds ? nullptr
                                                             : "a node that does not dial this one";
}

// Both ends must see alike who called whom, in which lives, in which cluster.
void Channel::begin_session() {
  const uint64_t mine[] = {own_.self, own_.boot}, other[] = {hello_.from, hello_.boot};
  const auto& caller = dialled_ ? mine : other;
  const auto& called = dialled_ ? other : mine;
  const uint64_t context[] = {kClusterFormat, own_.digest, caller[0],
                              caller[1],      called[0],   called[1]};
  session_ = std::make_unique<SecureSession>(
      own_.key, dialled_ ? SecureSession::Role::Client : SecureSession::Role::Server,
      dialled_ ? nonce_ : hello_.nonce, dialled_ ? hello_.nonce : nonce_,
      std::as_bytes(std::span(context)));
}

void Channel::seal(FrameKind kind, std::span<const std::byte> payload, Bytes& out) {
  ClusterFrame f;
  f.kind = uint8_t(kind);
  f.payload_bytes = uint32_t(payload.size());
  f.number = session_->next_to_send();
  const SecureSession::Part parts[] = {tagged_head(f), payload};
  f.tag = session_->seal(parts);
  append(f, payload, out);
}

void Channel::seal(const Message& message, Bytes& out) {
  body_.clear();
  encode(message, body_);
  seal(FrameKind::Message, body_, out);
}

const char* Channel::take(const ClusterFrame& f, std::span<const std::byte> payload, Bytes& out,
                          std::optional<Message>& message) {
  message.reset();
  if (payload.size() != f.payload_bytes) return "a payload of another length";
  if (!session_) {
    std::memcpy(&hello_, payload.data(), sizeof hello_);
    if (const char* defect = hello_defect()) return defect;
    if (!dialled_) {
      peer_ = hello_.from;
      greet(out);
    }
    begin_session();
    seal(FrameKind::Confirm, {}, out);
    return nullptr;
  }
  const SecureSession::Part parts[] = {tagged_head(f), payload};
  if (!session_->open(f.number, parts, f.tag)) return "a wrong tag or number";
  authenticated_ = true;
  if (FrameKind(f.kind) == FrameKind::Confirm) return nullptr;
  auto m = decode(payload, own_.seeds);
  if (!m || m->from != *peer_ || m->from_boot != hello_.boot || m->to != own_.self)
    return "a message that is none, or another's";
  message = std::move(m);
  return nullptr;
}

}  // namespace certkv::cluster
