// The bytes of an audit file: links of a digest chain. runtime/AUDIT.md is the specification.
//
// Shared by writer and verifier: only bytes, no arithmetic of the method. All integers and floats
// are little-endian.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace certkv::audit {

inline constexpr int kFormat = 1;
inline constexpr std::string_view kMagic = "CKVAUDIT";
inline constexpr std::string_view kExtension = ".audit";
inline constexpr size_t kHeadBytes = 16, kDigestBytes = 32;
inline constexpr uint64_t kMaxPayloadBytes = uint64_t(1) << 30;  // beyond: not written by us
inline constexpr size_t kMaxChunkRows = 4096;

enum class LinkKind : uint32_t {
  Header = 1,    // JSON: the first link
  Prompt = 2,    // JSON: a stream of rows, shared by the sequences decoded from it
  Sequence = 3,  // JSON: a decode of a prompt under one policy
  Rows = 4,      // originals, see RowsHead
  Record = 5,    // one KV head at one step, see Record
  Close = 6,     // JSON: a sequence has ended
  End = 7,       // JSON: the file is complete up to here
};
inline constexpr uint32_t kLinkKinds = 7;

using Digest = std::array<uint8_t, kDigestBytes>;
std::string hex(const Digest& digest);

// SHA-256 over the digest before, the link's head and its payload, one link after the other.
class DigestChain {
 public:
  DigestChain();  // starts at SHA-256(kMagic)
  ~DigestChain();
  DigestChain(const DigestChain&) = delete;
  DigestChain& operator=(const DigestChain&) = delete;
  const Digest& add(std::string_view head, std::string_view payload);
  const Digest& last() const { return last_; }

 private:
  struct Hash;
  std::unique_ptr<Hash> hash_;
  Digest last_{};
};

struct LinkHead {
  uint32_t kind = 0;
  uint32_t zero = 0;
  uint64_t payload_bytes = 0;
};
static_assert(sizeof(LinkHead) == kHeadBytes);

// Rows [first_row, first_row + rows) of one KV head: K [rows, head_dim], then V, 16 bits an
// element.
struct RowsHead {
  uint32_t stream = 0, layer = 0, kv_head = 0, rows = 0;
  uint64_t first_row = 0;
};
static_assert(sizeof(RowsHead) == 24);

// Figures of one head, in the order in which they are written.
struct HeadFigures {
  double bound = 0, e_key = 0, e_val = 0, e_fp = 0, e_key_paper = 0;
  double s = 0, s_lo = 0, relative = 0, den = 0, e_acc = 0;
  double key_sqrt = 0, key_sum = 0, r_term = 0, h_term = 0, s_term = 0, out_norm = 0;
  double candidate_bound = 0, candidate_relative = 0;
};
static_assert(sizeof(HeadFigures) == 18 * 8);

struct RecordHead {
  uint32_t stream = 0, layer = 0, kv_head = 0, first_query_head = 0, heads = 0, blocks = 0;
  uint64_t tokens = 0;  // of the context, the current one included
  uint64_t step = 0;    // of the engine, as in steps.jsonl
};
static_assert(sizeof(RecordHead) == 40);

struct HeadHead {
  uint8_t outcome = 0, rung = 0;  // kernels/arith/verdict.h
  uint16_t zero = 0;
  uint32_t corrections = 0;  // blocks replaced in the sums since the pass
  uint64_t promoted_keys = 0, promoted_values = 0;
};
static_assert(sizeof(HeadHead) == 24);

struct HeadRecord {
  HeadHead head;
  HeadFigures figures;
  std::vector<double> mass;       // [blocks] rho'_b
  std::vector<float> q, out;      // [head_dim]
  std::vector<float> delta, eta;  // [blocks] charged
  std::vector<uint8_t> used;      // [blocks] 1: original keys, 2: original values
};
struct Record {
  RecordHead head;
  std::vector<float> nu;  // [blocks] charged
  std::vector<HeadRecord> heads;
};

// REQUIRES every vector of its stated length.
std::string encode(const Record& record);
// Returns "" or what is wrong. A payload of another length than its head says is refused.
std::string decode(std::string_view payload, size_t head_dim, Record* record);

template <typename T>
void put(std::string& out, const T& value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}
template <typename T>
void put_all(std::string& out, std::span<const T> values) {
  out.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

// "audit-003-rank-0001.audit" of session 3.
std::string file_name(int session, int rank);
// The first session number that no file of the folder has.
int next_session(const std::string& folder);

}  // namespace certkv::audit
