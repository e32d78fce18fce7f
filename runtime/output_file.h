// Files that the job writes: whole ones that appear at once or not at all, and ones that only grow.
//
// ERRORS: IoError with the path, the system's reason and what to do; the job ends and can be
// resumed. A full disk shows here as ENOSPC, EDQUOT or EFBIG (SIGXFSZ must be ignored, see
// runtime/signals.h).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace certkv {

// Writes `path` through a temporary file beside it, which is fsynced and renamed: a reader, and
// whoever comes after a crash, sees the old content or the new one.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();  // without commit() the temporary file is removed
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::string_view bytes);  // buffered
  void commit();

 private:
  void flush();
  std::string path_, temporary_, buffer_;
  int fd_ = -1;
};

void write_file_atomically(const std::string& path, std::string_view bytes);

// Makes a folder and its parents.
void make_folders(const std::string& path);

// Appends to a file. An append is all or nothing as far as this process can tell: after a failure
// the file is cut back to where it was.
class AppendFile {
 public:
  // Creates the file if missing and cuts it to keep_bytes.
  // REQUIRES keep_bytes <= size of the file
  AppendFile(std::string path, uint64_t keep_bytes);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  void append(std::string_view bytes);
  void sync();  // to the disk
  uint64_t bytes() const { return bytes_; }
  int fd() const { return fd_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
  uint64_t bytes_ = 0;
};

// At most one process writes a folder. The lock goes with the process, however that ends, and is
// not inherited by children. Throws InvalidArgument where another process has it.
class FolderLock {
 public:
  explicit FolderLock(const std::string& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_ = -1;
};

}  // namespace certkv
