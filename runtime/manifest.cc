#include "runtime/manifest.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "kernels/base/failpoint.h"
#include "runtime/json_file.h"
#include "runtime/options_io.h"
#include "runtime/output_file.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr uint64_t kWholeFileBytes = uint64_t(64) << 20;
constexpr uint64_t kStretchBytes = uint64_t(256) << 10;
constexpr uint64_t kStretches = 64;

// Options that change speed and size only; model.path is replaced by what lies there.
bool changes_answers(const std::string& key) {
  for (const char* prefix : {"scratch.", "store.", "parallel.", "audit.", "http.", "run."}) {
    if (key.starts_with(prefix)) return false;
  }
  return key != "log_level" && key != "model.path";
}

std::string hex(XXH128_hash_t h) {
  return fmt::format("{:016x}{:016x}", h.high64, h.low64);
}

struct Hash {
  Hash() { XXH3_128bits_reset(state); }
  ~Hash() { XXH3_freeState(state); }
  Hash(const Hash&) = delete;
  Hash& operator=(const Hash&) = delete;
  void add(const void* bytes, size_t n) { XXH3_128bits_update(state, bytes, n); }
  void add(const std::string& text) {
    const uint64_t n = text.size();
    add(&n, sizeof n);
    add(text.data(), text.size());
  }
  std::string text() const { return hex(XXH3_128bits_digest(state)); }
  XXH3_state_t* state = XXH3_createState();
};

void add_stretch(Hash& hash, int fd, uint64_t from, uint64_t bytes, const std::string& path) {
  std::vector<char> buffer(size_t(std::min<uint64_t>(bytes, uint64_t(1) << 20)));
  while (bytes > 0) {
    const ssize_t n =
        ::pread(fd, buffer.data(), size_t(std::min<uint64_t>(bytes, buffer.size())), off_t(from));
    if (n < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(n > 0, BadFile, "{}: reading failed at byte {}: {}", path, from,
                  n < 0 ? std::strerror(errno) : "the file became shorter");
    hash.add(buffer.data(), size_t(n));
    from += uint64_t(n);
    bytes -= uint64_t(n);
  }
}

void add_file(Hash& hash, const fs::path& path) {
  struct File {
    int fd;
    ~File() {
      if (fd >= 0) ::close(fd);
    }
  } file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  struct stat status {};
  CERTKV_EXPECT(file.fd >= 0 && ::fstat(file.fd, &status) == 0 && S_ISREG(status.st_mode), BadFile,
                "{}: cannot be read: {}", path.string(), std::strerror(errno));
  const uint64_t bytes = uint64_t(status.st_size);
  hash.add(path.filename().string());
  hash.add(&bytes, sizeof bytes);
  if (bytes <= kWholeFileBytes) return add_stretch(hash, file.fd, 0, bytes, path.string());
  for (uint64_t i = 0; i < kStretches; ++i) {
    add_stretch(hash, file.fd, (bytes - kStretchBytes) / (kStretches - 1) * i, kStretchBytes,
                path.string());
  }
  add_stretch(hash, file.fd, bytes - kStretchBytes, kStretchBytes, path.string());
}

}  // namespace

JobIdentity identify_job(const JobOptions& options, const BatchSurvey& input,
                         const std::string& model_files) {
  JobIdentity identity;
  identity["input"] =
      fmt::format("{} lines, {} bytes, XXH3 {}", input.lines, input.bytes, input.digest);
  identity["model.files"] = "XXH3 " + model_files;
  JobOptions copy = options;
  const OptionTable table(copy);
  for (const OptionField& field : table.fields()) {
    if (changes_answers(field.key)) identity[field.key] = option_value_text(field.target);
  }
  return identity;
}

std::string identity_digest(const JobIdentity& identity) {
  Hash hash;
  for (const auto& [name, value] : identity) {
    hash.add(name);
    hash.add(value);
  }
  return hash.text();
}

std::vector<std::string> identity_differences(const JobIdentity& then, const JobIdentity& now) {
  const auto value = [](const JobIdentity& in, const std::string& name) {
    const auto at = in.find(name);
    return at == in.end()       ? std::string("not there")
           : at->second.empty() ? std::string("empty")
                                : at->second;
  };
  std::vector<std::string> list;
  JobIdentity names = then;
  names.insert(now.begin(), now.end());
  for (const auto& [name, ignored] : names) {
    if (value(then, name) == value(now, name)) continue;
    list.push_back(
        fmt::format("{} was {} and is now {}", name, value(then, name), value(now, name)));
  }
  return list;
}

std::vector<std::filesystem::path> model_files(const std::string& folder) {
  std::vector<fs::path> files;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string type = entry.path().extension().string();
    if (type == ".json" || type == ".safetensors" || type == ".model")
      files.push_back(entry.path());
  }
  CERTKV_EXPECT(!error, BadFile, "model folder {}: {}", folder, error.message());
  std::sort(files.begin(), files.end());
  return files;
}

std::string digest_model_files(const std::string& folder) {
  Hash hash;
  for (const fs::path& file : model_files(folder)) add_file(hash, file);
  return hash.text();
}

EarlierJob read_manifest(const std::string& folder) {
  EarlierJob job;
  const std::string path = folder + "/manifest.json";
  std::error_code error;
  if (!fs::exists(path, error)) return job;
  job.text = read_file_bounded(path, size_t(64) << 20);
  const json v = parse_json(job.text, path);
  const json& identity = json_member(v, "identity", path);
  CERTKV_EXPECT(identity.is_object() && json_member(v, "format", path) == 1, BadFile,
                "{}: not a manifest of this version", path);
  for (const auto& [name, value] : identity.items()) {
    CERTKV_EXPECT(value.is_string(), BadFile, "{}: identity.{} is no text", path, name);
    job.identity[name] = value.get<std::string>();
  }
  job.exists = true;
  return job;
}

void write_manifest(const std::string& folder, const JobIdentity& identity,
                    const BatchSurvey& input, const std::string& options_echo,
                    const ManifestSession& session, const EarlierJob& earlier) {
  CERTKV_FAILPOINT(output_manifest);
  json v = {{"format", 1},
            {"job", identity_digest(identity)},
            {"identity", identity},
            {"input", {{"lines", input.lines}, {"bytes", input.bytes}, {"digest", input.digest}}}};
  if (!options_echo.empty()) {
    v["configuration"] = parse_json(options_echo, "the echo of the options");
  }
  v["sessions"] = json::array();
  if (earlier.exists) {
    const json old = parse_json(earlier.text, "manifest.json");
    if (old.contains("sessions") && old["sessions"].is_array()) v["sessions"] = old["sessions"];
  }
  json now = {{"name", session.name},      {"started", session.started}, {"host", session.host},
              {"ranks", session.ranks},    {"tensor", session.tensor},   {"data", session.data},
              {"command", session.command}};
  if (session.audit_sample > 0)
    now["audit"] = {{"sample", session.audit_sample}, {"folder", session.audit_folder}};
  v["sessions"].push_back(std::move(now));
  write_file_atomically(folder + "/manifest.json",
                        v.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}

}  // namespace certkv
