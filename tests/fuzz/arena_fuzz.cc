// What another process may have written into the shared memory: the arena's header, and a block.
// Whatever it is, it is refused, or it is the block that was asked for, byte for byte.
//   input: a mode, then bytes that are XORed over what is right
//     0 a slot        1 a slot, whose seal the attacker has then computed anew
//     2 the arena     3 the arena's header, with its checksum computed anew
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>

#include "kernels/base/error.h"
#include "kernels/digest.h"
#include "kvstore/arena.h"
#include "kvstore/arena_reader.h"
#include "kvstore/control.h"
#include "kvstore/span_directory.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;

constexpr uint64_t kNonce = 77, kArenaBytes = 8192;
constexpr BlockShape kShape{DType::BF16, 2, 16};
constexpr size_t kSlot = kShape.slot_bytes();

struct alignas(64) Slot {
  std::byte bytes[kSlot];
};

SpanRecord record_of(Slot* slot) {
  SpanRecord r;
  r.request.owner = {5, 6};
  r.request.shape = kShape;
  r.boot_nonce = kNonce;
  r.fence = 9;
  r.version = 3;
  r.runs = {slot->bytes};
  return r;
}

Slot sealed_slot() {
  Slot slot{};
  const SpanRecord record = record_of(&slot);
  std::byte* k = slot.bytes + kShape.k_offset();
  std::byte* v = slot.bytes + kShape.v_offset();
  for (size_t i = 0; i < kShape.payload_bytes(); ++i) {
    k[i] = std::byte(i * 7 + 1);
    v[i] = std::byte(i * 5 + 2);
  }
  BlockHeader h;
  h.magic = kBlockMagic;
  h.format = kFormatVersion;
  h.header_bytes = uint16_t(kBlockHeaderBytes);
  h.id = record.id(0, 0, 0);
  h.fence = record.fence;
  h.dtype = uint8_t(kShape.dtype);
  h.tokens = h.block_tokens = kShape.block_tokens;
  h.head_dim = kShape.head_dim;
  h.k_digest = payload_digest(k, kShape.payload_bytes());
  h.v_digest = payload_digest(v, kShape.payload_bytes());
  h.seal = block_seal(h);
  std::memcpy(slot.bytes, &h, sizeof h);
  return slot;
}

void change(std::byte* at, size_t bytes, const uint8_t* by, size_t count) {
  for (size_t i = 0; i < std::min(bytes, count); ++i) at[i] ^= std::byte(by[i]);
}

void read_slot(bool seal_anew, const uint8_t* by, size_t count) {
  static const Slot right = sealed_slot();
  Slot slot = right;
  change(slot.bytes, kSlot, by, count);
  if (seal_anew) {
    BlockHeader h;
    std::memcpy(static_cast<void*>(&h), slot.bytes, sizeof h);
    h.seal = block_seal(h);
    std::memcpy(slot.bytes, &h, sizeof h);
  }
  const SpanRecord record = record_of(&slot);
  SpanDirectory directory;
  require(directory.add(&record), "the first reservation overlaps");
  const std::atomic<bool> no = false;
  ArenaReader reader(nullptr, directory, no, no);
  const BlockId id = record.id(0, 0, 0);
  for (const bool view : {false, true}) {
    std::vector<uint16_t> k(kShape.elements()), v(kShape.elements());
    const Destination to{BlockPart::Both, view, k.data(), v.data()};
    ReadTicket ticket = reader.read({&id, 1}, {&to, 1}, Deadline::after(std::chrono::seconds(1)));
    const BlockResult result = BlockReader::wait(ticket)[0];
    require(result.status == BlockStatus::Ok || result.status == BlockStatus::Absent ||
                result.status == BlockStatus::Corrupt,
            "a state that a read of this memory cannot have");
    if (result.status != BlockStatus::Ok) {
      require(result.k == nullptr && result.v == nullptr, "bytes of a block that is not Ok");
      continue;
    }
    ++fuzz::accepted;
    // Only the count of tokens may be another's choice: its digests cover every row.
    require(result.tokens >= 1 && result.tokens <= kShape.block_tokens, "tokens beyond the block");
    BlockHeader was, is;
    std::memcpy(static_cast<void*>(&was), right.bytes, sizeof was);
    std::memcpy(static_cast<void*>(&is), slot.bytes, sizeof is);
    is.tokens = was.tokens;
    is.seal = was.seal;
    require(std::memcmp(&is, &was, sizeof is) == 0, "another header was read well");
    require(std::memcmp(result.k, right.bytes + kShape.k_offset(), kShape.payload_bytes()) == 0 &&
                std::memcmp(result.v, right.bytes + kShape.v_offset(), kShape.payload_bytes()) == 0,
            "other bytes than were sealed");
  }
}

void map_arena(bool checksum_anew, const uint8_t* by, size_t count) {
  const Arena made = Arena::create(kArenaBytes, kNonce);
  void* view = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_SHARED, made.fd(), 0);
  require(view != MAP_FAILED, "no memory");
  ArenaHeader before, h;
  std::memcpy(static_cast<void*>(&before), view, sizeof before);
  change(static_cast<std::byte*>(view), kArenaBytes, by, count);
  std::memcpy(static_cast<void*>(&h), view, sizeof h);
  if (checksum_anew) {
    h.checksum = arena_checksum(h);
    std::memcpy(view, &h, sizeof h);
  }
  try {
    const Arena mapped = Arena::map(fcntl(made.fd(), F_DUPFD_CLOEXEC, 0), kArenaBytes, kNonce);
    ++fuzz::accepted;
    require(h.magic == before.magic && h.format == before.format && h.uid == before.uid &&
                h.boot_nonce == before.boot_nonce && h.arena_bytes == before.arena_bytes &&
                h.data_offset == before.data_offset && h.reserved == 0,
            "an arena with another header was mapped");
    for (const uint64_t offset : {uint64_t(0), uint64_t(64), kArenaBytes, UINT64_MAX - 63}) {
      bool refused = false;
      try {
        mapped.at(offset, 64);
      } catch (const Error& e) {
        refused = e.kind() == ErrorKind::Corrupt;
      }
      require(refused, "an extent outside the arena");
    }
  } catch (const Error& e) {
    require(e.kind() == ErrorKind::CommError, "refused with an unexpected kind of error");
  }
  munmap(view, kArenaBytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const unsigned mode = data[0] & 3;
  if (mode < 2)
    read_slot(mode == 1, data + 1, size - 1);
  else
    map_arena(mode == 3, data + 1, size - 1);
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  std::vector<std::string> seeds;
  for (const char mode : {'\0', '\1', '\2', '\3'})
    seeds.push_back(std::string(1, mode) + std::string(128, '\0'));
  return {
      "ArenaFuzz",
      seeds,
      {std::string(1, '\1'), std::string(1, '\x80'), std::string(2, '\xff'), std::string(4, '\xff'),
       std::string(8, '\xff'), std::string(8, '\0'), std::string(64, '\0')},
      4000};
}
