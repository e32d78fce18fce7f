// Identities that outlive what they named: reservations given back, space used again, stores that
// were replaced. The oracle is a table of what was sealed under which identity.
#include <fmt/format.h>

#include <map>

#include "kernels/base/error.h"
#include "tests/faults/worker.h"
#include "tests/kvstore/store_support.h"

namespace certkv::faults {
namespace {

struct Written {
  OriginalsSpan span;
  ReserveRequest request;
  std::map<BlockId, std::vector<uint16_t>> rows;  // of K; V is its complement
};

std::vector<uint16_t> complement(std::vector<uint16_t> rows) {
  for (uint16_t& x : rows) x = uint16_t(~x);
  return rows;
}

BlockId alter(BlockId id, Draw& draw) {
  switch (draw.below(7)) {
    case 0:
      id.boot_nonce ^= uint64_t(1) << draw.below(64);
      break;
    case 1:
      id.owner.hi ^= uint64_t(1) << draw.below(64);
      break;
    case 2:
      id.owner.lo ^= uint64_t(1) << draw.below(64);
      break;
    case 3:
      id.layer += 1 + uint32_t(draw.below(3));
      break;
    case 4:
      id.kv_head += 1 + uint32_t(draw.below(3));
      break;
    case 5:
      id.block += 1 + uint32_t(draw.below(3));
      break;
    default:
      id.version += draw.chance(0.5) ? 1 : uint32_t(-1);
  }
  return id;
}

}  // namespace

Outcome stale_generation(Bench&, Draw& draw) {
  const BlockShape shape = test::small_shape();
  // Little room, so that space is used again and again.
  std::unique_ptr<test::ThreadHolder> store =
      std::make_unique<test::ThreadHolder>(uint64_t(256) << 10);
  std::shared_ptr<StoreClient> client = store->attach();
  std::vector<Written> live;
  std::vector<BlockId> gone;
  std::vector<OwnerId> owners;
  for (int i = 0; i < 3; ++i) owners.push_back(private_owner());
  uint64_t reads = 0;

  const auto check = [&](const BlockId& id) -> std::string {
    ++reads;
    const test::Copied got = test::read_copy(*client->reader(), id, shape);
    const std::vector<uint16_t>* right = nullptr;
    for (const Written& w : live)
      if (const auto it = w.rows.find(id); it != w.rows.end()) right = &it->second;
    if (right == nullptr)
      return got.result.status == BlockStatus::Absent
                 ? ""
                 : fmt::format("an identity of nothing is {}",
                               block_status_name(got.result.status));
    if (got.result.status != BlockStatus::Ok)
      return fmt::format("a sealed block is {}", block_status_name(got.result.status));
    if (got.k != *right || got.v != complement(*right)) return "wrong bytes, as Ok";
    return "";
  };

  for (int turn = 0; turn < 120; ++turn) {
    std::string wrong;
    switch (draw.below(6)) {
      case 0: {
        ReserveRequest r;
        r.owner = draw.of(owners);
        r.shape = shape;
        r.layers = uint32_t(draw.between(1, 2));
        r.kv_heads = uint32_t(draw.between(1, 2));
        r.blocks = uint32_t(draw.between(1, 4));
        try {
          live.push_back({client->reserve(r), r, {}});
        } catch (const Error& e) {
          if (e.kind() != ErrorKind::OutOfMemory && e.kind() != ErrorKind::InvalidArgument) throw;
        }
        break;
      }
      case 1:
      case 2: {
        if (live.empty()) break;
        Written& w = live[size_t(draw.below(live.size()))];
        const uint32_t l = uint32_t(draw.below(w.request.layers));
        const uint32_t h = uint32_t(draw.below(w.request.kv_heads));
        const uint32_t b = uint32_t(draw.below(w.request.blocks));
        if (w.span.sealed(l, h, b)) break;
        std::vector<uint16_t> rows(shape.elements());
        for (uint16_t& x : rows) x = uint16_t(draw.bits());
        w.span.seal_block(l, h, b, rows.data(), complement(rows).data());
        w.rows[w.span.id(l, h, b)] = rows;
        break;
      }
      case 3: {
        if (live.empty()) break;
        const size_t i = size_t(draw.below(live.size()));
        for (const auto& [id, rows] : live[i].rows) gone.push_back(id);
        live.erase(live.begin() + std::ptrdiff_t(i));
        break;
      }
      case 4: {  // another store in its place: what was, is gone for ever
        if (!draw.chance(0.1)) break;
        for (const Written& w : live)
          for (const auto& [id, rows] : w.rows) gone.push_back(id);
        live.clear();
        client.reset();
        store = std::make_unique<test::ThreadHolder>(uint64_t(256) << 10);
        client = store->attach();
        break;
      }
      default: {
        if (!gone.empty() && draw.chance(0.5)) wrong = check(draw.of(gone));
        if (!live.empty() && !live.back().rows.empty()) {
          const BlockId id = live.back().rows.begin()->first;
          if (wrong.empty()) wrong = check(id);
          if (wrong.empty()) wrong = check(alter(id, draw));
        }
      }
    }
    if (!wrong.empty()) return {Outcome::Result::Violation, wrong};
  }
  live.clear();
  return {reads > 0 ? Outcome::Result::Same : Outcome::Result::Unreached,
          fmt::format("{} reads", reads)};
}

}  // namespace certkv::faults
