#include "runtime/batch_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "runtime/batch_fields.h"
#include "runtime/json_file.h"
#include "runtime/line_reader.h"

namespace certkv {
namespace {

using nlohmann::json;

bool is_blank(const std::string& text) {
  return text.find_first_not_of(" \t\r\f\v") == std::string::npos;
}

void mark_bad(BatchLine& line, ErrorKind kind, const std::string& message) {
  line.bad = true;
  line.error_kind = kind;
  line.error = fmt::format("line {}: {}", line.number, message);
}

// A custom_id is taken over before anything else is looked at, so that an error can be told to
// whoever sent the line.
void read_custom_id(const json& object, BatchLine& line, const BatchLimits& limits) {
  const auto at = object.find("custom_id");
  if (at == object.end() || at->is_null()) return;
  CERTKV_EXPECT(at->is_string() && !at->get_ref<const std::string&>().empty() &&
                    at->get_ref<const std::string&>().size() <= limits.custom_id_bytes,
                InvalidArgument, "custom_id is {}: a string of 1 to {} bytes is needed", shown(*at),
                limits.custom_id_bytes);
  line.custom_id = at->get<std::string>();
}

json take_certkv(json& object, const json* body) {
  const bool outside = object.contains("certkv");
  const bool inside = body != nullptr && body->contains("certkv");
  CERTKV_EXPECT(!(outside && inside), InvalidArgument,
                "certkv is given twice, beside body and in it: give it once");
  return outside ? object["certkv"] : inside ? (*body)["certkv"] : json();
}

void read_openai_line(json& object, BatchLine& line, const BatchDefaults& defaults,
                      const BatchLimits& limits) {
  for (const auto& [name, value] : object.items()) {
    CERTKV_EXPECT(name == "custom_id" || name == "method" || name == "url" || name == "body" ||
                      name == "certkv",
                  InvalidArgument,
                  "{} is not a field of a batch line: custom_id, method, url, body and certkv are",
                  name.substr(0, 64));
  }
  CERTKV_EXPECT(object.contains("url"), InvalidArgument,
                "url is missing: /v1/completions or /v1/chat/completions is needed");
  const json& url = object["url"];
  CERTKV_EXPECT(url == "/v1/completions" || url == "/v1/chat/completions", InvalidArgument,
                "url is {}: /v1/completions and /v1/chat/completions are supported", shown(url));
  line.kind = url == "/v1/completions" ? BatchKind::Completion : BatchKind::Chat;
  CERTKV_EXPECT(!object.contains("method") || object["method"] == "POST", InvalidArgument,
                "method is {}: POST is needed", shown(object["method"]));
  CERTKV_EXPECT(object.contains("body"), InvalidArgument, "body is missing");
  json& body = object["body"];
  CERTKV_EXPECT(body.is_object(), InvalidArgument, "body is {}: an object is needed", shown(body));
  const json certkv = take_certkv(object, &body);
  body.erase("certkv");
  if (!certkv.is_null()) read_certkv_field(certkv, line, defaults);
  read_request_body(body, line, limits);
}

void read_plain_line(json& object, BatchLine& line, const BatchDefaults& defaults,
                     const BatchLimits& limits) {
  line.kind = BatchKind::Plain;
  CERTKV_EXPECT(!object.contains("messages"), InvalidArgument,
                "messages needs the batch form: url /v1/chat/completions, and messages in body");
  const json certkv = take_certkv(object, nullptr);
  if (!certkv.is_null()) read_certkv_field(certkv, line, defaults);
  object.erase("certkv");
  object.erase("custom_id");
  read_request_body(object, line, limits);
}

}  // namespace

BatchLine parse_batch_line(std::string_view text, uint64_t number, const BatchDefaults& defaults,
                           const BatchLimits& limits) {
  BatchLine line;
  line.number = number;
  line.custom_id = std::to_string(number);
  line.sampling = defaults.sampling;
  line.policy = defaults.policy;
  line.tolerance = defaults.tolerance;
  try {
    json object = parse_json(text, "the line",
                             {.max_bytes = limits.line_bytes,
                              .max_depth = limits.json_depth,
                              .max_values = limits.json_values});
    CERTKV_EXPECT(object.is_object(), BadFile, "{} is no request: a JSON object is needed",
                  shown(object));
    read_custom_id(object, line, limits);
    if (object.contains("url") || object.contains("body") || object.contains("method")) {
      read_openai_line(object, line, defaults, limits);
    } else {
      read_plain_line(object, line, defaults, limits);
    }
  } catch (const Error& e) {
    mark_bad(line, e.kind(), e.what());
  } catch (const json::exception& e) {
    mark_bad(line, ErrorKind::BadFile, e.what());
  }
  return line;
}

struct BatchReader::State {
  State(int descriptor, const std::string& p, BatchDefaults d, BatchLimits l)
      : fd(descriptor), path(p), defaults(std::move(d)), limits(l) {
    restart();
  }
  ~State() {
    ::close(fd);
    XXH3_freeState(hash);
  }
  void restart() {
    lines = std::make_unique<LineReader>(fd, path, limits.line_bytes);
    XXH3_128bits_reset(hash);
    index = 0;
    seen.clear();
  }
  void hash_line(const LineReader::Line& line) {
    // Of an overlong line, its length: it fails whatever it holds.
    const uint64_t length = line.bytes;
    XXH3_128bits_update(hash, &length, sizeof length);
    XXH3_128bits_update(hash, line.text.data(), line.text.size());
  }
  std::string digest() const {
    const XXH128_hash_t h = XXH3_128bits_digest(hash);
    return fmt::format("{:016x}{:016x}", h.high64, h.low64);
  }

  int fd;
  std::string path;
  BatchDefaults defaults;
  BatchLimits limits;
  std::unique_ptr<LineReader> lines;
  XXH3_state_t* hash = XXH3_createState();
  uint64_t index = 0;
  std::string surveyed;
  std::unordered_map<std::string, uint64_t> seen;  // custom_id -> line number
};

BatchReader::BatchReader(const std::string& path, BatchDefaults defaults, BatchLimits limits) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  CERTKV_EXPECT(fd >= 0, BadFile, "{}: the input cannot be opened: {}; give it with --input", path,
                std::strerror(errno));
  struct stat status {};
  const bool regular = ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  if (!regular) ::close(fd);
  CERTKV_EXPECT(regular, BadFile,
                "{}: the input must be a regular file, since it is read twice and on resume", path);
  state_ = std::make_unique<State>(fd, path, std::move(defaults), limits);
}

BatchReader::~BatchReader() = default;

BatchSurvey BatchReader::survey() {
  BatchSurvey survey;
  state_->restart();
  LineReader::Line line;
  while (state_->lines->next(line)) {
    state_->hash_line(line);
    survey.bytes += line.bytes + (line.terminated ? 1 : 0);
    if (line.overlong || !is_blank(line.text)) ++survey.lines;
  }
  survey.digest = state_->surveyed = state_->digest();
  state_->restart();
  return survey;
}

std::optional<BatchLine> BatchReader::next() {
  State& s = *state_;
  LineReader::Line raw;
  do {
    if (!s.lines->next(raw)) {
      CERTKV_EXPECT(s.surveyed.empty() || s.surveyed == s.digest(), BadFile,
                    "{}: the input was changed while the job ran; restore it and continue with "
                    "--resume, or start a new job",
                    s.path);
      return std::nullopt;
    }
    s.hash_line(raw);
  } while (!raw.overlong && is_blank(raw.text));

  std::string_view text = raw.text;
  if (raw.number == 1 && text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  BatchLine line;
  if (raw.overlong) {
    line.number = raw.number;
    line.custom_id = std::to_string(raw.number);
    line.tolerance = s.defaults.tolerance;
    line.policy = s.defaults.policy;
    mark_bad(line, ErrorKind::BadFile,
             fmt::format("{} bytes: a line may have at most {}", raw.bytes, s.limits.line_bytes));
  } else {
    line = parse_batch_line(text, raw.number, s.defaults, s.limits);
  }
  line.index = s.index++;
  const auto [at, fresh] = s.seen.try_emplace(line.custom_id, line.number);
  if (!fresh && !line.bad) {
    mark_bad(line, ErrorKind::InvalidArgument,
             fmt::format("custom_id '{}' was used before, on line {}", line.custom_id, at->second));
  }
  return line;
}

LineIdentity identity_of(const BatchLine& line) {
  return {line.index, line.number, line.custom_id, line.kind, line.model, line.tolerance};
}

Completion failed_completion(uint64_t index, Policy policy, ErrorKind kind, std::string message) {
  Completion c;
  c.id = index;
  c.policy = policy;
  c.failed = true;
  c.error_kind = error_kind_name(kind);
  c.error = std::move(message);
  c.outcome = Outcome::Failed;
  return c;
}

}  // namespace certkv
