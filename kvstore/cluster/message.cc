#include "kvstore/cluster/message.h"

#include <algorithm>
#include <cstring>

namespace certkv::cluster {
namespace {

bool has_members(MessageKind kind) {
  return kind == MessageKind::Propose || kind == MessageKind::Install;
}
bool has_proposal(MessageKind kind) {
  return kind >= MessageKind::Propose;
}

}  // namespace

void encode(const Message& m, std::vector<std::byte>& out) {
  MessageHead h;
  h.kind = uint8_t(m.kind);
  h.from = m.from;
  h.to = m.to;
  h.address_bytes = m.address_bytes;
  h.floor = m.floor;
  h.from_boot = m.from_boot;
  h.to_boot = m.to_boot;
  h.sequence = m.sequence;
  h.stamp = m.stamp;
  h.echo = m.echo;
  h.challenge = m.challenge;
  h.answer = m.answer;
  h.epoch = m.epoch;
  h.heard = m.heard.bits();
  h.lag_bytes = m.lag_bytes;
  h.free_bytes = m.free_bytes;
  if (has_proposal(m.kind)) h.proposal = m.proposal;
  if (has_members(m.kind)) h.members = m.members.bits();
  const size_t boots = NodeSet(h.members).count();
  size_t at = out.size();
  out.resize(at + sizeof h + 8 * boots + m.address_bytes);
  std::memcpy(out.data() + at, &h, sizeof h);
  at += sizeof h;
  for (const NodeId n : NodeSet(h.members)) {
    std::memcpy(out.data() + at, &m.boots[n], 8);
    at += 8;
  }
  if (m.address_bytes != 0) std::memcpy(out.data() + at, m.address.data(), m.address_bytes);
}

std::optional<Message> decode(std::span<const std::byte> bytes, size_t seeds) {
  MessageHead h;
  if (bytes.size() < sizeof h) return std::nullopt;
  std::memcpy(&h, bytes.data(), sizeof h);
  const NodeSet all = NodeSet::first(unsigned(seeds)), members(h.members);
  if (h.kind < uint8_t(MessageKind::Hello) || h.kind > uint8_t(MessageKind::Install) ||
      h.from >= seeds || h.to >= seeds || h.from == h.to || h.address_bytes > kMaxDataAddress ||
      h.from_boot == 0 || h.reserved != 0 || NodeSet(h.heard).without(all).count() != 0 ||
      members.without(all).count() != 0) {
    return std::nullopt;
  }
  Message m;
  m.kind = MessageKind(h.kind);
  if (has_proposal(m.kind) != (h.proposal != 0) || has_members(m.kind) != (members.count() != 0))
    return std::nullopt;
  if (bytes.size() != sizeof h + 8 * members.count() + h.address_bytes) return std::nullopt;
  m.from = h.from;
  m.to = h.to;
  m.from_boot = h.from_boot;
  m.to_boot = h.to_boot;
  m.sequence = h.sequence;
  m.stamp = h.stamp;
  m.echo = h.echo;
  m.challenge = h.challenge;
  m.answer = h.answer;
  m.epoch = h.epoch;
  m.floor = h.floor;
  m.heard = NodeSet(h.heard);
  m.lag_bytes = h.lag_bytes;
  m.free_bytes = h.free_bytes;
  m.proposal = h.proposal;
  m.members = members;
  size_t at = sizeof h;
  for (const NodeId n : members) {
    std::memcpy(&m.boots[n], bytes.data() + at, 8);
    if (m.boots[n] == 0) return std::nullopt;
    at += 8;
  }
  m.address_bytes = h.address_bytes;
  if (h.address_bytes != 0) std::memcpy(m.address.data(), bytes.data() + at, h.address_bytes);
  const std::string_view text = m.data_address();
  if (!std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < '\x7f'; }))
    return std::nullopt;
  return m;
}

}  // namespace certkv::cluster
