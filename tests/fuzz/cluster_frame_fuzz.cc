// What comes over a cluster's control port. Promises: nothing a stranger sends is a message; what
// decodes encodes to the same bytes; a stranger's messages change nothing of a node's view, and a
// peer that has the key and talks nonsense cannot take a node back to an older view, make it act
// without a majority, or make it say more than a few messages for one.
//   first byte 0: a stranger's stream to a fresh connection
//              1: the bytes of one message, decoded and handed to a node that knows nobody
//              2: records of [field, value] that alter a known peer's next message
#include <cstring>

#include "kvstore/cluster/channel.h"
#include "kvstore/cluster/membership.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using namespace certkv::cluster;
using certkv::fuzz::require;

constexpr size_t kSeeds = 3;
constexpr size_t kMostPerMessage = 4 * kSeeds;

// Whether all of it was taken.
bool stranger(std::span<const std::byte> bytes) {
  static const ChannelIdentity identity{JobKey::generate(), 0, 100, 7, kSeeds};
  Channel channel(identity, std::nullopt);
  Channel::Bytes answer;
  while (!bytes.empty()) {
    ClusterFrame f;
    if (bytes.size() < sizeof f) return false;
    std::memcpy(&f, bytes.data(), sizeof f);
    if (channel.defect(f) != nullptr) return false;
    require(f.payload_bytes <= kMaxMessageBytes, "a payload without a limit");
    bytes = bytes.subspan(sizeof f);
    if (bytes.size() < f.payload_bytes) return false;
    std::optional<Message> message;
    const char* wrong = channel.take(f, bytes.first(f.payload_bytes), answer, message);
    require(!message && !channel.authenticated(), "a stranger was believed");
    require(answer.size() <= 2 * sizeof f + sizeof(ClusterHello), "a stranger was told too much");
    if (wrong != nullptr) return false;
    bytes = bytes.subspan(f.payload_bytes);
  }
  return true;
}

bool one_message(std::span<const std::byte> bytes) {
  const auto m = decode(bytes, kSeeds);
  if (!m) return false;
  std::vector<std::byte> again;
  encode(*m, again);
  require(
      again.size() == bytes.size() && std::memcmp(again.data(), bytes.data(), again.size()) == 0,
      "a message has two forms");
  Membership node(kSeeds, 0, 100, Time(1'000'000));
  Output out;
  node.receive(*m, Time(1'100'000), out);
  require(node.view().epoch == 0 && !node.active(Time(1'100'000)), "a stranger changed the view");
  require(out.messages.size() <= kMostPerMessage, "too much was said");
  return true;
}

// Node 0 under test, nodes 1 and 2 played by the input.
struct Bench {
  Membership node{kSeeds, 0, 100, Time(1'000'000)};
  Time now{1'000'000};
  Output out;
  uint64_t sequence = 0, challenge = 0, stamp = 0;

  Message from(NodeId n) {
    Message m;
    m.from = n;
    m.to = 0;
    m.from_boot = 100u + n;
    m.to_boot = 100;
    m.sequence = ++sequence;
    m.stamp = uint64_t(now.count());
    m.heard = NodeSet(7);
    return m;
  }
  void hear(const Message& m) {
    out.clear();
    node.receive(m, now, out);
  }
  // Both peers are known and alive afterwards.
  void introduce() {
    for (const NodeId n : {NodeId(1), NodeId(2)}) {
      hear(from(n));
      for (const Message& answer : out.messages)
        if (answer.to == n) challenge = answer.challenge;
      Message hello = from(n);
      hello.kind = MessageKind::Hello;
      hello.answer = challenge;
      hear(hello);
      Message beat = from(n);
      beat.echo = uint64_t(now.count());
      hear(beat);
      require(node.alive(now).has(n), "a good peer was not taken in");
    }
  }
};

bool nonsense(std::span<const std::byte> bytes) {
  Bench b;
  b.introduce();
  Message m = b.from(1);
  while (bytes.size() >= 9) {
    const auto field = uint8_t(bytes[0]);
    uint64_t value;
    std::memcpy(&value, bytes.data() + 1, 8);
    bytes = bytes.subspan(9);
    switch (field % 16) {
      case 0:
        m.kind = MessageKind(1 + value % 6);
        break;
      case 1:
        m.proposal = value;
        break;
      case 2:
        m.proposal = make_epoch(uint32_t(value), m.from, m.from_boot);
        break;
      case 3:
        m.members = NodeSet(value & 7);
        break;
      case 4:
        m.boots[value % kSeeds] = value / kSeeds;
        break;
      case 5:
        m.boots = {100, 101, 102};
        break;
      case 6:
        m.epoch = value;
        break;
      case 7:
        m.floor = uint32_t(value);
        break;
      case 8:
        m.echo = value;
        break;
      case 9:
        m.stamp = value;
        break;
      case 10:
        m.from_boot = value;
        break;
      case 11:
        m.challenge = value;
        break;
      case 12:
        m.heard = NodeSet(value & 7);
        break;
      case 13:
        m.sequence = value;
        break;
      case 14: {  // time goes on
        b.now += Time(int64_t(value % 3'000'000));
        b.out.clear();
        b.node.tick(b.now, b.out);
        break;
      }
      default: {
        const uint64_t epoch = b.node.view().epoch;
        b.hear(m);
        require(b.node.view().epoch >= epoch, "back to an older view");
        require(b.out.messages.size() <= kMostPerMessage, "too much was said");
        require(!b.node.active(b.now) || b.node.view().admits(0, 100),
                "acts without being a member");
        m = b.from(NodeId(1 + value % 2));
        if (value & 4) m.echo = uint64_t(b.now.count());
      }
    }
  }
  return true;
}

std::string record(uint8_t field, uint64_t value) {
  std::string r(1, char(field));
  return r.append(reinterpret_cast<const char*>(&value), 8);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data) + 1, size - 1);
  const bool well = data[0] % 3 == 0   ? stranger(bytes)
                    : data[0] % 3 == 1 ? one_message(bytes)
                                       : nonsense(bytes);
  if (well) ++fuzz::accepted;
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  const ChannelIdentity caller{JobKey::generate(), 1, 101, 7, kSeeds};
  Channel::Bytes hello;
  Channel(caller, 0).greet(hello);
  Message m;
  m.kind = MessageKind::Install;
  m.from = 1;
  m.to = 0;
  m.from_boot = 101;
  m.to_boot = 100;
  m.sequence = 1;
  m.proposal = make_epoch(1, 1, 101);
  m.members = NodeSet(7);
  m.boots = {100, 101, 102};
  m.address_bytes = 3;
  m.address = {'a', ':', '1'};
  std::vector<std::byte> message;
  encode(m, message);
  const auto text = [](char mode, const std::vector<std::byte>& b) {
    return std::string(1, mode).append(reinterpret_cast<const char*>(b.data()), b.size());
  };
  const std::string install =
      record(0, 5) + record(2, 3) + record(3, 7) + record(5, 0) + record(15, 5);
  const std::string propose =
      record(0, 2) + record(2, 4) + record(3, 7) + record(5, 0) + record(15, 4);
  return {"ClusterFrameFuzz",
          {text('\0', hello), text('\1', message),
           "\2" + install + record(14, 150'000) + propose + record(14, 2'500'000) + install,
           "\2" + propose + record(6, make_epoch(9, 2, 102)) + record(15, 1)},
          {record(0, 2), record(0, 3), record(2, 1), record(3, 3), record(5, 0), record(8, 1),
           record(10, 7), record(11, 9), record(13, ~uint64_t(0)), record(14, 700'000),
           record(15, 5), std::string("\0\0\0\0", 4), "\xff\xff\xff\xff", std::string("\1\0", 2)},
          40'000};
}
