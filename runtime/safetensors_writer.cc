#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "kernels/base/error.h"
#include "runtime/checked_math.h"
#include "runtime/safetensors.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;

// A file that disappears unless it is committed.
class NewFile {
 public:
  explicit NewFile(fs::path target) : target_(std::move(target)) {
    std::random_device random;
    for (int attempt = 0; attempt < 16 && fd_ < 0; ++attempt) {
      path_ = target_.string() + fmt::format(".{:08x}.part", random());
      fd_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd_ < 0 && errno != EEXIST) break;
    }
    if (fd_ < 0) fail("cannot be created");
  }
  ~NewFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!path_.empty()) ::unlink(path_.c_str());
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const void* data, uint64_t count) {
    const auto* from = static_cast<const std::byte*>(data);
    while (count > 0) {
      const ssize_t put = ::write(fd_, from, std::min<uint64_t>(count, uint64_t(1) << 30));
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) fail("cannot be written");
      from += put;
      count -= uint64_t(put);
    }
  }

  void commit() {
    if (::fsync(fd_) != 0) fail("cannot be flushed");
    const int fd = std::exchange(fd_, -1);
    if (::close(fd) != 0) fail("cannot be closed");
    if (::rename(path_.c_str(), target_.c_str()) != 0) fail("cannot be renamed into place");
    path_.clear();
    // The file is whole either way; a folder that cannot be flushed only delays its name.
    const fs::path parent = target_.has_parent_path() ? target_.parent_path() : fs::path(".");
    const int folder = ::open(parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder >= 0) {
      ::fsync(folder);
      ::close(folder);
    }
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    CERTKV_THROW(IoError, "{}: {}: {}", target_.string(), what, std::strerror(errno));
  }
  fs::path target_;
  std::string path_;
  int fd_ = -1;
};

}  // namespace

void write_safetensors(const fs::path& path, std::span<const TensorToWrite> tensors,
                       const std::map<std::string, std::string>& metadata) {
  // ordered_json would look every key up linearly; the order of keys carries no meaning anyway.
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::vector<uint64_t> sizes;
  uint64_t at = 0;
  for (const TensorToWrite& t : tensors) {
    CERTKV_EXPECT(!t.name.empty() && t.name != "__metadata__" && !header.contains(t.name),
                  InvalidArgument, "{}: tensor name '{}' is empty, reserved or used twice",
                  path.string(), t.name);
    CERTKV_EXPECT(t.shape.size() <= kSafetensorsMaxDimensions, InvalidArgument,
                  "{}: tensor '{}' has {} dimensions: at most {} are allowed", path.string(),
                  t.name, t.shape.size(), kSafetensorsMaxDimensions);
    uint64_t bytes = dtype_bytes(t.dtype);
    for (const int64_t d : t.shape) {
      CERTKV_EXPECT(d >= 0 && checked_multiply(bytes, uint64_t(d), &bytes), InvalidArgument,
                    "{}: tensor '{}' of shape {} has no size", path.string(), t.name,
                    shape_text(t.shape));
    }
    CERTKV_EXPECT(bytes == 0 || t.data != nullptr, InvalidArgument, "{}: tensor '{}' has no data",
                  path.string(), t.name);
    uint64_t end = 0;
    CERTKV_EXPECT(checked_add(at, bytes, &end), InvalidArgument,
                  "{}: the tensors together have no size", path.string());
    header[t.name] = {
        {"dtype", dtype_name(t.dtype)}, {"shape", t.shape}, {"data_offsets", {at, end}}};
    sizes.push_back(bytes);
    at = end;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');  // the data starts aligned
  CERTKV_EXPECT(text.size() <= kSafetensorsMaxHeaderBytes, InvalidArgument,
                "{}: a header of {} bytes: at most {} are allowed", path.string(), text.size(),
                kSafetensorsMaxHeaderBytes);

  std::array<unsigned char, 8> length{};
  for (size_t i = 0; i < 8; ++i) length[i] = (unsigned char)(uint64_t(text.size()) >> (8 * i));
  NewFile file(path);
  file.write(length.data(), length.size());
  file.write(text.data(), text.size());
  for (size_t i = 0; i < tensors.size(); ++i) file.write(tensors[i].data, sizes[i]);
  file.commit();
}

}  // namespace certkv
