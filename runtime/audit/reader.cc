#include "runtime/audit/reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/json_file.h"

namespace certkv::audit {

using nlohmann::json;

PayloadReader::PayloadReader(const std::string& path)
    : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  struct stat status {};
  if (fd_ < 0 || ::fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode)) {
    const int error = errno;
    if (fd_ >= 0) ::close(fd_);
    CERTKV_THROW(BadFile, "{}: cannot be read: {}", path, std::strerror(error));
  }
  bytes_ = uint64_t(status.st_size);
}

PayloadReader::~PayloadReader() {
  ::close(fd_);
}

bool PayloadReader::read(Place place, std::string* out) const {
  if (place.offset > bytes_ || place.bytes > bytes_ - place.offset) return false;
  out->resize(place.bytes);
  size_t done = 0;
  while (done < place.bytes) {
    const ssize_t n =
        ::pread(fd_, out->data() + done, place.bytes - done, off_t(place.offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += size_t(n);
  }
  return true;
}

namespace {

constexpr int64_t kMost = int64_t(1) << 40, kMostTokens = int64_t(1) << 30;

double number(const json& object, const char* key, const std::string& name) {
  const json& v = json_member(object, key, name);
  CERTKV_EXPECT(v.is_number() && std::isfinite(v.get<double>()), BadFile, "{}: {} is no number",
                name, key);
  return v.get<double>();
}

bool is_half(const json& planes, const std::string& name) {
  const std::string& type = json_string(planes, "metadata", name);
  CERTKV_EXPECT(type == "F16" || type == "F32", BadFile, "{}: metadata is '{}'", name, type);
  return type == "F16";
}

PlaneRules planes_of(const json& v, const std::string& name) {
  PlaneRules p;
  p.code_bits = int(json_integer(v, "code_bits", 1, 16, name));
  p.residual_bits = int(json_integer(v, "residual_bits", 0, p.code_bits - 1, name));
  p.read_residual = json_bool_or(v, "read_residual", false, name);
  p.half_metadata = is_half(v, name);
  return p;
}

FileHeader header_of(const json& v, const std::string& name) {
  FileHeader h;
  json_integer(v, "format", kFormat, kFormat, name);
  h.session = int(json_integer(v, "session", 0, 1 << 30, name));
  h.world = int(json_integer(v, "world", 1, 1 << 20, name));
  h.rank = int(json_integer(v, "rank", 0, h.world - 1, name));
  h.tensor = int(json_integer(v, "tensor", 1, h.world, name));
  h.tensor_rank = int(json_integer(v, "tensor_rank", 0, h.tensor - 1, name));
  h.replica = int(json_integer(v, "replica", 0, h.world - 1, name));
  h.sample = number(v, "sample", name);
  CERTKV_EXPECT(h.sample > 0 && h.sample <= 1, BadFile, "{}: sample is {}", name, h.sample);
  const json& seed = json_member(v, "seed", name);
  CERTKV_EXPECT(seed.is_number_unsigned(), BadFile, "{}: seed is no number", name);
  h.seed = seed.get<uint64_t>();
  const json& model = json_member(v, "model", name);
  h.model_files = json_string(model, "files", name);
  h.layers = json_integer(model, "layers", 1, 1 << 20, name);
  h.query_heads = json_integer(model, "query_heads", 1, 1 << 20, name);
  h.kv_heads = json_integer(model, "kv_heads", 1, h.query_heads, name);
  CERTKV_EXPECT(h.query_heads % h.kv_heads == 0, BadFile, "{}: {} query heads, {} KV heads", name,
                h.query_heads, h.kv_heads);
  h.layout.head_dim = int(json_integer(model, "head_dim", 16, 1024, name));
  const json& heads = json_member(v, "kv_heads", name);
  h.first_kv_head = json_integer(heads, "first", 0, h.kv_heads - 1, name);
  h.local_kv_heads = json_integer(heads, "count", 1, h.kv_heads - h.first_kv_head, name);
  const std::string& dtype = json_string(v, "originals", name);
  CERTKV_EXPECT(dtype == "BF16" || dtype == "F16", BadFile, "{}: originals are '{}'", name, dtype);
  h.bf16 = dtype == "BF16";
  LayoutRules& l = h.layout;
  l.block_tokens = int(json_integer(v, "block_tokens", 1, 4096, name));
  l.group_tokens = int(json_integer(v, "group_tokens", 1, 1 << 16, name));
  l.value_group = int(json_integer(v, "value_group", 8, l.head_dim, name));
  CERTKV_EXPECT(l.head_dim % 8 == 0 && l.value_group % 8 == 0 && l.head_dim % l.value_group == 0 &&
                    l.group_tokens % l.block_tokens == 0,
                BadFile, "{}: head_dim {}, groups of {} elements and {} tokens, blocks of {}", name,
                l.head_dim, l.value_group, l.group_tokens, l.block_tokens);
  const json& layout = json_member(v, "layout", name);
  l.key = planes_of(json_member(layout, "key", name), name);
  l.value = planes_of(json_member(layout, "value", name), name);
  const std::string backend = v.contains("backend") ? json_string(v, "backend", name) : "cpu";
  CERTKV_EXPECT(backend == "cpu" || backend == "device", BadFile, "{}: the backend is '{}'", name,
                backend);
  l.device = backend == "device";
  // What is known of a device's bytes (kernels/METHOD.md, 12b).
  CERTKV_EXPECT(!l.device || (l.block_tokens == 16 && l.value.code_bits == 4 &&
                              l.value.residual_bits == 0 && l.value.half_metadata),
                BadFile, "{}: no device serves such a layout", name);
  const json& rounding = json_member(v, "rounding", name);
  h.eps_w = number(rounding, "eps_w", name);
  h.chain_codes = number(rounding, "chain_codes", name);
  h.chain_originals = number(rounding, "chain_originals", name);
  h.chain_output = number(rounding, "chain_output", name);
  h.query_levels = number(rounding, "query_levels", name);
  h.exp_absolute = number(rounding, "exp_absolute", name);
  // Less than this no FP32 evaluation has (method 3 and 4b: chain + 4; 3u * 104 of eps_w).
  CERTKV_EXPECT(h.eps_w >= 312 * 0x1p-24 && h.chain_codes >= 5 && h.chain_originals >= 5 &&
                    h.chain_output >= 5 && h.exp_absolute >= 0 && h.exp_absolute <= 1 &&
                    h.eps_w < 1 && (h.query_levels == 0 || h.query_levels >= 256) &&
                    h.chain_codes < 65536 && h.chain_originals < 65536 && h.chain_output < 65536,
                BadFile, "{}: the stated rounding is beyond reason", name);
  return h;
}

class Indexer {
 public:
  Indexer(FileIndex* out) : out_(*out) {}

  // Throws BadFile.
  void take(LinkKind kind, std::string_view payload, Place place, const std::string& name) {
    CERTKV_EXPECT((out_.links == 0) == (kind == LinkKind::Header), BadFile,
                  "{}: the header is not the first link, or not the only one", name);
    out_.ended = false;
    switch (kind) {
      case LinkKind::Header:
        out_.header = header_of(parse_json(payload, name), name);
        out_.has_header = true;
        return;
      case LinkKind::Prompt:
        return prompt(parse_json(payload, name), name);
      case LinkKind::Sequence:
        return sequence(parse_json(payload, name), name);
      case LinkKind::Close:
        return close(parse_json(payload, name), name);
      case LinkKind::End:
        return end(parse_json(payload, name), name);
      case LinkKind::Rows:
        return rows(payload, place, name);
      case LinkKind::Record:
        return record(payload, place, name);
    }
    CERTKV_THROW(BadFile, "{}: a link of kind {}", name, uint32_t(kind));
  }

 private:
  StreamInfo& add(const json& v, const std::string& name) {
    const auto id = uint32_t(json_integer(v, "stream", 1, (int64_t(1) << 32) - 1, name));
    CERTKV_EXPECT(out_.streams.count(id) == 0, BadFile, "{}: stream {} is opened twice", name, id);
    StreamInfo& s = out_.streams[id];
    s.id = id;
    s.request = json_integer(v, "request", 0, kMost, name);
    s.prompt_tokens = uint64_t(json_integer(v, "prompt_tokens", 0, kMostTokens, name));
    s.max_tokens = uint64_t(json_integer(v, "max_tokens", 0, kMostTokens, name));
    return s;
  }
  StreamInfo& known(int64_t id, const std::string& name) {
    const auto at = out_.streams.find(uint32_t(id));
    CERTKV_EXPECT(at != out_.streams.end(), BadFile, "{}: stream {} was never opened", name, id);
    return at->second;
  }
  void prompt(const json& v, const std::string& name) { add(v, name); }
  void sequence(const json& v, const std::string& name) {
    const auto from = uint32_t(json_integer(v, "prompt", 1, (int64_t(1) << 32) - 1, name));
    const StreamInfo parent = known(from, name);
    StreamInfo& s = add(v, name);
    s.prompt = from;
    s.policy = json_string(v, "policy", name);
    const json& t = json_member(v, "tolerance", name);
    s.relative = t.contains("relative");
    s.tolerance = number(t, s.relative ? "relative" : "absolute", name);
    CERTKV_EXPECT(parent.is_prompt() && parent.request == s.request &&
                      parent.prompt_tokens == s.prompt_tokens && parent.max_tokens == s.max_tokens,
                  BadFile, "{}: sequence {} does not continue prompt {}", name, s.id, from);
  }
  void close(const json& v, const std::string& name) {
    StreamInfo& s = known(json_integer(v, "stream", 1, (int64_t(1) << 32) - 1, name), name);
    CERTKV_EXPECT(!s.is_prompt() && !s.closed, BadFile, "{}: stream {} cannot be closed", name,
                  s.id);
    s.closed = true;
    s.tokens =
        uint64_t(json_integer(v, "tokens", 0, int64_t(s.prompt_tokens + s.max_tokens), name));
    s.failed = json_bool_or(v, "failed", false, name);
    s.records = uint64_t(json_integer(v, "records", 0, kMost, name));
    s.head_steps = uint64_t(json_integer(v, "head_steps", 0, kMost, name));
    for (const char* list : {"outcomes", "rungs"}) {
      const json& counts = json_member(v, list, name);
      CERTKV_EXPECT(counts.is_object(), BadFile, "{}: {} is no object", name, list);
      for (const auto& [key, ignored] : counts.items())
        (list[0] == 'o' ? s.outcomes : s.rungs)[key] =
            uint64_t(json_integer(counts, key.c_str(), 0, kMost, name));
    }
  }
  void end(const json& v, const std::string& name) {
    CERTKV_EXPECT(json_integer(v, "links", 0, kMost, name) == int64_t(out_.links) &&
                      json_integer(v, "records", 0, kMost, name) == int64_t(out_.records),
                  BadFile, "{}: the end counts other links or records than the file has", name);
    out_.ended = true;
  }
  UnitKey unit(uint32_t stream, uint32_t layer, uint32_t kv_head, const std::string& name) {
    known(stream, name);
    const FileHeader& h = out_.header;
    CERTKV_EXPECT(layer < h.layers && kv_head >= h.first_kv_head &&
                      kv_head < h.first_kv_head + h.local_kv_heads,
                  BadFile, "{}: layer {} KV head {} is not this rank's", name, layer, kv_head);
    return {stream, layer, kv_head};
  }
  void rows(std::string_view payload, Place place, const std::string& name) {
    RowsHead r;
    const uint64_t row = 4 * uint64_t(out_.header.layout.head_dim);
    CERTKV_EXPECT(payload.size() >= sizeof r, BadFile, "{}: rows without a head", name);
    std::memcpy(&r, payload.data(), sizeof r);
    CERTKV_EXPECT(r.rows >= 1 && payload.size() == sizeof r + r.rows * row, BadFile,
                  "{}: {} rows in {} bytes", name, r.rows, payload.size());
    auto& list = out_.rows[unit(r.stream, r.layer, r.kv_head, name)];
    const StreamInfo& s = out_.streams.at(r.stream);
    const uint64_t next = list.empty() ? (s.is_prompt() ? 0 : s.prompt_tokens)
                                       : list.back().first_row + list.back().rows;
    CERTKV_EXPECT(r.first_row == next && !s.closed, BadFile,
                  "{}: rows of stream {} layer {} KV head {} begin with {}, {} was next", name,
                  r.stream, r.layer, r.kv_head, r.first_row, next);
    list.push_back({r.first_row, r.rows, {place.offset + sizeof r, place.bytes - sizeof r}});
  }
  void record(std::string_view payload, Place place, const std::string& name) {
    RecordHead r;
    CERTKV_EXPECT(payload.size() >= sizeof r, BadFile, "{}: a record without a head", name);
    std::memcpy(&r, payload.data(), sizeof r);
    const UnitKey key = unit(r.stream, r.layer, r.kv_head, name);
    const StreamInfo& s = out_.streams.at(r.stream);
    auto& list = out_.record[key];
    CERTKV_EXPECT(!s.is_prompt() && !s.closed && r.tokens > s.prompt_tokens &&
                      (list.empty() || r.tokens > list.back().tokens),
                  BadFile, "{}: a record of stream {} at {} tokens is out of order", name, r.stream,
                  r.tokens);
    list.push_back({r.tokens, place});
    ++out_.records;
  }

  FileIndex& out_;
};

}  // namespace

FileIndex read_index(const std::string& path, const std::function<void(uint64_t)>& progress) {
  FileIndex out;
  out.path = path;
  const PayloadReader file(path);
  out.bytes = file.bytes();
  const auto stop = [&](const std::string& what, uint64_t at, bool truncated) {
    out.broken = fmt::format("{} at byte {} of {}, link {}", what, at, out.bytes, out.links);
    out.truncated = truncated;
    out.ended = false;
  };
  std::string head, payload;
  if (!file.read({0, kMagic.size()}, &head)) {
    stop("truncated", 0, true);
    return out;
  }
  if (head != kMagic) {
    stop("not an audit file of this format", 0, false);
    return out;
  }
  DigestChain chain;
  Indexer indexer(&out);
  uint64_t at = kMagic.size();
  out.digest = chain.last();
  progress(at);
  while (at < out.bytes) {
    LinkHead link;
    const uint64_t left = out.bytes - at;
    if (left < kHeadBytes + kDigestBytes || !file.read({at, kHeadBytes}, &head)) {
      stop("truncated", at, true);
      break;
    }
    std::memcpy(&link, head.data(), sizeof link);
    const bool known = link.kind >= 1 && link.kind <= kLinkKinds && link.zero == 0 &&
                       link.payload_bytes <= kMaxPayloadBytes;
    if (!known) {
      stop("the digest chain is broken: no link begins", at, false);
      break;
    }
    const Place place{at + kHeadBytes, link.payload_bytes};
    std::string digest;
    if (link.payload_bytes > left - kHeadBytes - kDigestBytes || !file.read(place, &payload) ||
        !file.read({place.offset + place.bytes, kDigestBytes}, &digest)) {
      stop("truncated (or the length of a link was altered)", at, true);
      break;
    }
    const Digest& expected = chain.add(head, payload);
    if (std::memcmp(expected.data(), digest.data(), kDigestBytes) != 0) {
      stop("the digest chain is broken: a link does not match its digest", at, false);
      break;
    }
    try {
      indexer.take(LinkKind(link.kind), payload, place, fmt::format("link {}", out.links));
    } catch (const Error& e) {
      stop(e.what(), at, false);
      break;
    }
    out.digest = expected;
    ++out.links;
    const uint64_t bytes = kHeadBytes + link.payload_bytes + kDigestBytes;
    at += bytes;
    progress(bytes);
  }
  if (out.broken.empty() && !out.ended)
    stop("truncated: the last link is not an end, so the writer was killed or the file was cut", at,
         true);
  return out;
}

}  // namespace certkv::audit
