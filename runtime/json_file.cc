#include "runtime/json_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"

namespace certkv {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

// Builds the document from the parser's events, so that every limit is met before memory grows.
class BoundedBuilder : public nlohmann::json_sax<json> {
 public:
  BoundedBuilder(const std::string& name, const JsonLimits& limits)
      : name_(name), limits_(limits) {}

  json take() { return std::move(root_); }

  bool null() override { return add(nullptr) != nullptr; }
  bool boolean(bool v) override { return add(v) != nullptr; }
  bool number_integer(number_integer_t v) override { return add(v) != nullptr; }
  bool number_unsigned(number_unsigned_t v) override { return add(v) != nullptr; }
  bool number_float(number_float_t v, const string_t&) override { return add(v) != nullptr; }
  bool string(string_t& v) override { return add(std::move(v)) != nullptr; }
  bool binary(binary_t&) override { return false; }

  bool start_object(size_t) override { return open(json::value_t::object); }
  bool start_array(size_t) override { return open(json::value_t::array); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& k) override {
    auto [at, fresh] = open_.back()->get_ref<json::object_t&>().try_emplace(std::move(k));
    CERTKV_EXPECT(fresh, BadFile, "{}: key '{:.80}' occurs twice in one object", name_, at->first);
    slot_ = &at->second;
    return true;
  }

  bool parse_error(size_t position, const std::string& token,
                   const nlohmann::detail::exception& e) override {
    CERTKV_THROW(BadFile, "{}: not valid JSON at byte {} near '{:.40}': {:.160}", name_, position,
                 printable(token), e.what());
  }

 private:
  static std::string printable(std::string s) {
    for (char& c : s)
      if (c < 32 || c > 126) c = '?';
    return s;
  }

  template <typename T>
  json* add(T&& value) {
    CERTKV_EXPECT(++values_ <= limits_.max_values, BadFile, "{}: more than {} JSON values", name_,
                  limits_.max_values);
    if (open_.empty()) {
      root_ = json(std::forward<T>(value));
      return &root_;
    }
    if (open_.back()->is_array()) {
      auto& array = open_.back()->get_ref<json::array_t&>();
      array.emplace_back(std::forward<T>(value));
      return &array.back();
    }
    *slot_ = json(std::forward<T>(value));
    return slot_;
  }

  bool open(json::value_t type) {
    CERTKV_EXPECT(open_.size() < limits_.max_depth, BadFile, "{}: JSON nested deeper than {}",
                  name_, limits_.max_depth);
    open_.push_back(add(type));
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& name_;
  const JsonLimits& limits_;
  json root_;
  std::vector<json*> open_;  // the containers being filled, outermost first
  json* slot_ = nullptr;     // where the value of the last key goes
  size_t values_ = 0;
};

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

bool inside(const fs::path& file, const fs::path& folder) {
  const fs::path rel = file.lexically_relative(folder);
  return !rel.empty() && *rel.begin() != ".." && *rel.begin() != ".";
}

const char* kind_of(const json& value) {
  return value.type_name();
}

}  // namespace

json parse_json(std::string_view text, const std::string& name, const JsonLimits& limits) {
  CERTKV_EXPECT(text.size() <= limits.max_bytes, BadFile, "{}: {} bytes; at most {} are read", name,
                text.size(), limits.max_bytes);
  BoundedBuilder builder(name, limits);
  const bool ok = json::sax_parse(text.begin(), text.end(), &builder);
  CERTKV_EXPECT(ok, BadFile, "{}: not valid JSON", name);
  return builder.take();
}

std::string read_file_bounded(const std::string& path, size_t max_bytes) {
  // Non-blocking, so that a pipe in place of the file cannot hold us up.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  CERTKV_EXPECT(file.fd >= 0, BadFile, "{}: cannot be opened: {}", path, std::strerror(errno));
  struct stat st {};
  CERTKV_EXPECT(::fstat(file.fd, &st) == 0, BadFile, "{}: {}", path, std::strerror(errno));
  CERTKV_EXPECT(S_ISREG(st.st_mode), BadFile, "{}: not a regular file", path);
  CERTKV_EXPECT(uint64_t(st.st_size) <= max_bytes, BadFile, "{}: {} bytes; at most {} are read",
                path, st.st_size, max_bytes);
  std::string text(size_t(st.st_size), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::read(file.fd, text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(n >= 0, BadFile, "{}: reading failed: {}", path, std::strerror(errno));
    CERTKV_EXPECT(n > 0, BadFile, "{}: ends at byte {} of {}; it is being changed", path, done,
                  text.size());
    done += size_t(n);
  }
  return text;
}

json load_json_file(const std::string& path, const JsonLimits& limits) {
  CERTKV_FAILPOINT(model_json);
  return parse_json(read_file_bounded(path, limits.max_bytes), path, limits);
}

std::string path_in_folder(const std::string& folder, std::string_view file_name) {
  std::error_code ec;
  const fs::path root = fs::canonical(folder, ec);
  CERTKV_EXPECT(!ec && fs::is_directory(root, ec), InvalidArgument,
                "model folder '{}' does not exist or is not a folder", folder);
  CERTKV_EXPECT(!file_name.empty() && file_name.size() <= 255 && file_name != "." &&
                    file_name != ".." &&
                    file_name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos,
                BadFile, "{}: '{:.80}' is not a plain file name", folder, file_name);
  const fs::path target = fs::canonical(root / file_name, ec);
  CERTKV_EXPECT(!ec, BadFile, "{}/{}: {}", folder, file_name, ec.message());
  const fs::path parent = root.parent_path();
  const bool in_cache =
      parent.filename() == "snapshots" && inside(target, parent.parent_path() / "blobs");
  CERTKV_EXPECT(inside(target, root) || in_cache, BadFile,
                "{}/{}: leads outside the model folder, to {}; put the file itself into the folder",
                folder, file_name, target.string());
  return target.string();
}

bool folder_has(const std::string& folder, std::string_view file_name) {
  std::error_code ec;
  return fs::symlink_status(fs::path(folder) / file_name, ec).type() != fs::file_type::not_found &&
         !ec;
}

const json& json_member(const json& object, const char* key, const std::string& name) {
  CERTKV_EXPECT(object.is_object(), BadFile, "{}: an object with '{}' was expected, found {}", name,
                key, kind_of(object));
  const auto at = object.find(key);
  CERTKV_EXPECT(at != object.end(), BadFile, "{}: '{}' is missing", name, key);
  return *at;
}

int64_t json_integer(const json& object, const char* key, int64_t least, int64_t most,
                     const std::string& name) {
  const json& value = json_member(object, key, name);
  CERTKV_EXPECT(value.is_number_integer(), BadFile, "{}: '{}' must be an integer, found {}", name,
                key, value.is_number() ? value.dump() : kind_of(value));
  const bool fits =
      value.is_number_unsigned() ? value.get<uint64_t>() <= uint64_t(INT64_MAX) : true;
  CERTKV_EXPECT(fits && value.get<int64_t>() >= least && value.get<int64_t>() <= most, BadFile,
                "{}: '{}' is {}; it must lie in [{}, {}]", name, key, value.dump(), least, most);
  return value.get<int64_t>();
}

const std::string& json_string(const json& object, const char* key, const std::string& name) {
  const json& value = json_member(object, key, name);
  CERTKV_EXPECT(value.is_string(), BadFile, "{}: '{}' must be a string, found {}", name, key,
                kind_of(value));
  return value.get_ref<const std::string&>();
}

bool json_bool_or(const json& object, const char* key, bool fallback, const std::string& name) {
  CERTKV_EXPECT(object.is_object(), BadFile, "{}: an object with '{}' was expected, found {}", name,
                key, kind_of(object));
  const auto at = object.find(key);
  if (at == object.end() || at->is_null()) return fallback;
  CERTKV_EXPECT(at->is_boolean(), BadFile, "{}: '{}' must be true or false, found {}", name, key,
                kind_of(*at));
  return at->get<bool>();
}

}  // namespace certkv
