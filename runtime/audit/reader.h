// Reads an audit file: checks every link of its chain and lists what it holds. Payloads are read
// again when they are needed, so that memory stays small. Nothing in a file is trusted.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/audit/format.h"
#include "runtime/audit/requantise.h"

namespace certkv::audit {

// What the file says about the job, from its header.
struct FileHeader {
  int session = 0, rank = 0, world = 1, replica = 0, tensor_rank = 0, tensor = 1;
  double sample = 0;
  uint64_t seed = 0;
  std::string model_files;
  int64_t layers = 0, query_heads = 0, kv_heads = 0;  // of the model
  int64_t first_kv_head = 0, local_kv_heads = 0;      // of the rank
  bool bf16 = true;
  LayoutRules layout;
  // What the backend states about its rounding.
  double eps_w = 0, chain_codes = 0, chain_originals = 0, chain_output = 0, query_levels = 0;
  double exp_absolute = 0;
};

struct StreamInfo {
  uint32_t id = 0, prompt = 0;  // prompt 0: this is one
  int64_t request = 0;
  std::string policy;
  bool relative = true;
  double tolerance = 0;
  uint64_t prompt_tokens = 0, max_tokens = 0;
  bool closed = false, failed = false;
  uint64_t tokens = 0, records = 0, head_steps = 0;  // as the Close link says
  std::map<std::string, uint64_t> outcomes, rungs;
  bool is_prompt() const { return prompt == 0; }
};

struct Place {  // of a payload
  uint64_t offset = 0, bytes = 0;
};
struct RowsRef {
  uint64_t first_row = 0, rows = 0;
  Place place;
};
struct RecordRef {
  uint64_t tokens = 0;
  Place place;
};
struct UnitKey {  // one KV head at one layer of one stream
  uint32_t stream = 0, layer = 0, kv_head = 0;
  friend auto operator<=>(const UnitKey&, const UnitKey&) = default;
};

struct FileIndex {
  std::string path;
  FileHeader header;
  bool has_header = false;
  bool ended = false;      // the last link is an End
  std::string broken;      // not empty: what is wrong, and where; what follows was not read
  bool truncated = false;  // `broken` is a missing end
  Digest digest{};         // of the last link that is whole
  uint64_t bytes = 0, links = 0, records = 0;
  std::map<uint32_t, StreamInfo> streams;
  std::map<UnitKey, std::vector<RowsRef>> rows;
  std::map<UnitKey, std::vector<RecordRef>> record;
};

// progress: bytes read since the last call.
FileIndex read_index(const std::string& path, const std::function<void(uint64_t)>& progress);

// Payloads of a file.
class PayloadReader {
 public:
  explicit PayloadReader(const std::string& path);  // throws BadFile
  ~PayloadReader();
  PayloadReader(const PayloadReader&) = delete;
  PayloadReader& operator=(const PayloadReader&) = delete;
  // False where the file has become shorter.
  bool read(Place place, std::string* out) const;
  uint64_t bytes() const { return bytes_; }

 private:
  int fd_ = -1;
  uint64_t bytes_ = 0;
};

}  // namespace certkv::audit
