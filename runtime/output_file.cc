#include "runtime/output_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"

namespace certkv {
namespace {

constexpr size_t kBufferBytes = size_t(1) << 18;

[[noreturn]] void fail(const std::string& path, const char* what, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  CERTKV_THROW(IoError, "{}: {} failed: {}{}", path, what, std::strerror(error),
               full ? "; make room on that disk and continue with --resume" : "");
}

void write_all(int fd, std::string_view bytes, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(path, "writing", n < 0 ? errno : EIO);
    bytes.remove_prefix(size_t(n));
  }
}

void sync_parent(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  const int fd = ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;  // the rename stands; only its order in a power cut is not known
  ::fsync(fd);
  ::close(fd);
}

}  // namespace

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)), temporary_(path_ + ".tmp." + std::to_string(::getpid())) {
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (fd_ < 0) fail(temporary_, "opening", errno);
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::flush() {
  write_all(fd_, buffer_, path_);
  buffer_.clear();
}

void AtomicFile::write(std::string_view bytes) {
  buffer_.append(bytes);
  if (buffer_.size() >= kBufferBytes) flush();
}

void AtomicFile::commit() {
  flush();
  if (::fsync(fd_) != 0) fail(path_, "writing to the disk", errno);
  CERTKV_FAILPOINT(output_replace);
  const int fd = fd_;
  fd_ = -1;
  if (::close(fd) != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary_.c_str());
    fail(path_, "replacing the file", error);
  }
  sync_parent(path_);
}

void write_file_atomically(const std::string& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void make_folders(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  CERTKV_EXPECT(std::filesystem::is_directory(path), IoError,
                "{}: the folder cannot be made: {}; choose another with --output", path,
                error ? error.message() : "something that is no folder has this name");
}

AppendFile::AppendFile(std::string path, uint64_t keep_bytes) : path_(std::move(path)) {
  fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (fd_ < 0) fail(path_, "opening", errno);
  struct stat status {};
  if (::fstat(fd_, &status) != 0 || !S_ISREG(status.st_mode) ||
      uint64_t(status.st_size) < keep_bytes ||
      (uint64_t(status.st_size) > keep_bytes && ::ftruncate(fd_, off_t(keep_bytes)) != 0)) {
    const int error = errno;
    ::close(fd_);
    fail(path_, "opening for appending", error);
  }
  bytes_ = keep_bytes;
  sync_parent(path_);
}

AppendFile::~AppendFile() {
  if (fd_ >= 0) ::close(fd_);
}

void AppendFile::append(std::string_view bytes) {
  try {
    CERTKV_FAILPOINT(output_append);
    if (CERTKV_FAILPOINT_FORCED(output_half)) {
      write_all(fd_, bytes.substr(0, bytes.size() / 2), path_);
      fail(path_, "writing", ENOSPC);
    }
    write_all(fd_, bytes, path_);
  } catch (const Error&) {
    // What was written of it is a torn line; a reader would drop it anyway if this fails too.
    if (::ftruncate(fd_, off_t(bytes_)) != 0) throw;
    throw;
  }
  bytes_ += bytes.size();
}

void AppendFile::sync() {
  CERTKV_FAILPOINT(output_sync);
  if (::fdatasync(fd_) != 0) fail(path_, "writing to the disk", errno);
}

FolderLock::FolderLock(const std::string& folder) {
  CERTKV_FAILPOINT(output_lock);
  const std::string path = folder + "/.lock";
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (fd_ < 0) fail(path, "opening", errno);
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  if (::fcntl(fd_, F_SETLK, &lock) == 0) return;
  const int error = errno;
  struct flock other = lock;
  const bool known = ::fcntl(fd_, F_GETLK, &other) == 0 && other.l_type != F_UNLCK;
  ::close(fd_);
  fd_ = -1;
  if (error != EACCES && error != EAGAIN) fail(path, "locking", error);
  CERTKV_THROW(InvalidArgument,
               "{}: another job{} is writing this folder; wait for it, or choose another with "
               "--output",
               folder, known ? fmt::format(" (process {})", other.l_pid) : "");
}

FolderLock::~FolderLock() {
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace certkv
