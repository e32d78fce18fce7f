// What a process sends to a store's control socket. Whatever it is, the connection is answered with
// well-formed frames or ended; what is handed out lies in the arena and never twice; and the store
// goes on serving.
//   input: first byte even: the rest is sent as it is
//          odd: records of [operation, damage, n, n bytes of payload], each made into a frame that
//          is right but for the damage: 1 sequence, 2 session, 4 checksum, 8 length, 16 reply bit
#include <map>

#include "kernels/base/log.h"
#include "tests/fuzz/target.h"
#include "tests/kvstore/raw_client.h"
#include "tests/kvstore/store_support.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;

constexpr uint64_t kArenaBytes = uint64_t(4) << 20;

const test::ThreadHolder& holder() {
  static const test::ThreadHolder instance = [] {
    log_set_level(LogLevel::Error);  // every dropped stranger is a warning
    HolderOptions o;
    o.attach_within = o.linger = std::chrono::milliseconds(-1);
    return test::ThreadHolder(kArenaBytes, o);
  }();
  return instance;
}

class Session {
 public:
  Session() : client_(holder().socket()) { require(client_.connected(), "no connection"); }

  // False once the connection has ended.
  bool send(uint8_t op, uint8_t damage, std::span<const std::byte> payload) {
    std::vector<std::byte> frame =
        make_frame(op, ControlStatus::Ok, sequence_ + 1, session_, payload);
    FrameHeader h;
    std::memcpy(&h, frame.data(), sizeof h);
    if (damage & 31) {
      if (damage & 1) h.sequence += 1 + damage;
      if (damage & 2) h.session ^= 1;
      if (damage & 16) h.op |= kReplyBit;
      const uint64_t checksum = h.checksum;
      frame = make_frame(h.op, ControlStatus::Ok, h.sequence, h.session, payload);
      std::memcpy(&h, frame.data(), sizeof h);
      if (damage & 4) h.checksum = ~checksum;
      if (damage & 8) h.payload_bytes += damage;
      std::memcpy(frame.data(), &h, sizeof h);
    }
    if (!client_.send_bytes(frame)) return false;
    if (damage & 8) return false;  // the store may wait for more
    FrameHeader answer;
    std::vector<std::byte> body;
    const bool answered = client_.receive_frame(answer, body);
    require(!client_.malformed(), "an answer that is no frame, or none");
    if (!answered) return false;
    require((damage & 31) == 0, "a damaged frame was answered");
    require(answer.op == (op | kReplyBit), "an answer to another operation");
    require(answer.sequence == ++sequence_, "an answer to another request");
    if (ControlOp(op) == ControlOp::Attach) session_ = answer.session;
    require(answer.session == session_, "another's session");
    if (ControlStatus(answer.status) == ControlStatus::Ok) judge(ControlOp(op), payload, body);
    return true;
  }

  // Whether anything was answered.
  bool send_raw(std::span<const std::byte> bytes) {
    client_.send_bytes(bytes);
    client_.finish_sending();
    FrameHeader answer;
    std::vector<std::byte> body;
    bool answered = false;
    while (client_.receive_frame(answer, body)) {
      require(answer.op & kReplyBit, "a request came back");
      answered = true;
    }
    require(!client_.malformed(), "an answer that is no frame, or none");
    return answered;
  }

 private:
  void judge(ControlOp op, std::span<const std::byte> request, std::span<const std::byte> body) {
    if (op == ControlOp::Allocate) {
      AllocateReply head;
      require(body.size() >= sizeof head, "an allocation without a head");
      std::memcpy(&head, body.data(), sizeof head);
      require(body.size() == sizeof head + 8 * size_t(head.runs), "another number of runs");
      auto& mine = held_[head.version];
      for (size_t i = 0; i < head.runs; ++i) {
        uint64_t at;
        std::memcpy(&at, body.data() + sizeof head + 8 * i, 8);
        require(at >= kArenaDataOffset && at <= kArenaBytes && head.run_bytes <= kArenaBytes - at,
                "a run outside the arena");
        mine.push_back({at, at + head.run_bytes});
      }
      std::vector<std::pair<uint64_t, uint64_t>> all;
      for (const auto& [version, runs] : held_) all.insert(all.end(), runs.begin(), runs.end());
      std::sort(all.begin(), all.end());
      for (size_t i = 1; i < all.size(); ++i)
        require(all[i - 1].second <= all[i].first, "the same bytes handed out twice");
    } else if (op == ControlOp::Release) {
      ReleaseRequest r;
      require(parse_payload(request, r), "a release of another length was accepted");
      auto& adopted = adopted_[r.version];
      if (adopted > 0)
        --adopted;
      else
        require(held_.erase(r.version) == 1, "what is not held was released");
    } else if (op == ControlOp::Adopt) {
      AdoptReply head;
      require(body.size() >= sizeof head, "an adoption without a head");
      std::memcpy(&head, body.data(), sizeof head);
      require(body.size() == sizeof head + 8 * size_t(head.part.runs), "another number of runs");
      ++adopted_[head.part.version];
    } else if (op == ControlOp::Detach) {
      held_.clear();
    }
  }

  test::RawClient client_;
  uint64_t sequence_ = 0, session_ = 0;
  std::map<uint32_t, std::vector<std::pair<uint64_t, uint64_t>>> held_;  // by reservation
  std::map<uint32_t, uint64_t> adopted_;                                 // holds besides that one
};

// A good client is answered, and its detaching frees what it held.
void expect_alive() {
  Session s;
  const AttachRequest attach{1, 0};
  require(s.send(uint8_t(ControlOp::Attach), 0, payload_of(attach)), "no attach");
  require(s.send(uint8_t(ControlOp::Capacity), 0, {}), "no capacity");
  require(s.send(uint8_t(ControlOp::Detach), 0, {}), "no detach");
}

std::string record(ControlOp op, uint8_t damage, std::span<const std::byte> payload) {
  std::string r{char(op), char(damage), char(payload.size())};
  return r.append(reinterpret_cast<const char*>(payload.data()), payload.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  {
    Session s;
    bool well = true;
    if (data[0] % 2 == 0) {
      well = s.send_raw(bytes.subspan(1));
    } else {
      for (size_t at = 1; well && at + 3 <= size;) {
        const size_t payload = std::min<size_t>(data[at + 2], size - at - 3);
        well = s.send(data[at], data[at + 1], bytes.subspan(at + 3, payload));
        at += 3 + payload;
      }
    }
    if (well) ++fuzz::accepted;
  }
  expect_alive();
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  const AttachRequest attach{1, 0};
  AllocateRequest allocate;
  allocate.owner = {1, 2};
  allocate.layers = 2;
  allocate.kv_heads = 2;
  allocate.blocks = 3;
  allocate.dtype = uint16_t(DType::F16);
  allocate.block_tokens = 16;
  allocate.head_dim = 64;
  const ReleaseRequest release{1, 0};
  const HeartbeatFrame beat{5};
  const std::string in = record(ControlOp::Attach, 0, payload_of(attach));
  const std::string out = record(ControlOp::Detach, 0, {});
  const std::string take = record(ControlOp::Allocate, 0, payload_of(allocate));
  const auto raw =
      make_frame(uint16_t(ControlOp::Attach), ControlStatus::Ok, 1, 0, payload_of(attach));
  std::string sent(1, '\0');
  sent.append(reinterpret_cast<const char*>(raw.data()), raw.size());
  return {"ControlFrameFuzz",
          {"\1" + in + take + record(ControlOp::Release, 0, payload_of(release)) + take + out,
           "\1" + in + record(ControlOp::Heartbeat, 0, payload_of(beat)) +
               record(ControlOp::Capacity, 0, {}) + record(ControlOp::Status, 0, {}) + out,
           "\1" + in + take + take + take, sent},
          {in, out, take, record(ControlOp::Release, 0, payload_of(release)), std::string(4, '\0'),
           std::string(4, '\xff'), std::string("\1\0\0\0", 4), std::string("\0\0\1\0", 4), "\x7f",
           "\x10", "\x40", std::string(1, '\0')},
          3000};
}
