// Reading and writing safetensors files.
//
// Bytes: u64 little endian n, then n bytes of JSON ({"name": {"dtype", "shape", "data_offsets"}},
// and optionally "__metadata__": texts), then the data. The tensors' bytes must tile the data
// without hole, overlap or rest.
//
// A file is an attacker's. The whole header is checked before any tensor is read or memory for one
// asked for: lengths, depth, equal names, types, overflow of products, offsets against shape and
// type, the file's size. Data is read by pread, never mapped, so that a file which shrinks under
// the reader is an error and not a SIGBUS. Every error names the file, and the tensor where there
// is one.
//
// SOURCE: the format description of huggingface/safetensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/dtype.h"

namespace certkv {

struct TensorEntry {
  std::string name;
  DType dtype = DType::F32;
  std::vector<int64_t> shape;  // row-major; empty: a scalar
  uint64_t elements = 0;       // product of shape
  uint64_t begin = 0;          // first byte, from the start of the file

  uint64_t bytes() const { return elements * dtype_bytes(dtype); }
};
std::string shape_text(std::span<const int64_t> shape);  // "[4, 128]"

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;             // in the order of their bytes
  std::map<std::string, std::string> metadata;  // of "__metadata__"
};

inline constexpr uint64_t kSafetensorsMaxHeaderBytes = uint64_t(64) << 20;
inline constexpr size_t kSafetensorsMaxDimensions = 8;

// Parses and checks the header of a file of `file_bytes` bytes of which `start` holds at least the
// length and the header (for tests and fuzzing it may hold the whole file).
// ENSURES every entry's [begin, begin + bytes()) lies within file_bytes.
// ERRORS: BadFile.
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> start, uint64_t file_bytes,
                                           const std::string& name);

// An open file. THREADS: reads may run at the same time.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);  // ERRORS: BadFile
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const SafetensorsHeader& header() const { return header_; }
  const TensorEntry* find(std::string_view name) const;   // null where absent
  const TensorEntry& tensor(std::string_view name) const;  // BadFile where absent

  // Elements [first, first + count) as they are stored, or as float (F32, F16, BF16 only; exact).
  // ERRORS: InvalidArgument for a range outside the tensor or a type that does not become float,
  // BadFile when the file has shrunk or cannot be read.
  void read_raw(const TensorEntry& t, uint64_t first, uint64_t count, void* out) const;
  void read_float(const TensorEntry& t, uint64_t first, uint64_t count, float* out) const;

  // Rows [row, row + rows), columns [column, column + columns) of a matrix [r, c] as float, written
  // to out [rows, columns]. Reads whole rows piece by piece, keeps at most 1 MiB of them.
  void read_block(const TensorEntry& t, int64_t row, int64_t rows, int64_t column, int64_t columns,
                  float* out) const;

 private:
  std::string path_;
  int fd_ = -1;
  SafetensorsHeader header_;
  std::map<std::string, size_t, std::less<>> index_;
};

// The weights of a model folder: model.safetensors, or the files that
// model.safetensors.index.json names (plain names of files in the folder; every tensor must be in
// the file the index says, and no tensor in a file may be missing from the index).
class SafetensorsFolder {
 public:
  explicit SafetensorsFolder(const std::filesystem::path& folder);  // ERRORS: BadFile
  ~SafetensorsFolder();

  struct Place {
    const SafetensorsFile* file = nullptr;
    const TensorEntry* entry = nullptr;
  };
  const std::string& folder() const { return folder_; }
  Place find(std::string_view name) const;    // nulls where absent
  Place tensor(std::string_view name) const;  // BadFile where absent
  const std::map<std::string, Place, std::less<>>& tensors() const { return places_; }

 private:
  std::string folder_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Place, std::less<>> places_;
};

struct TensorToWrite {
  std::string name;
  DType dtype = DType::F32;
  std::vector<int64_t> shape;
  const void* data = nullptr;  // product of shape elements, contiguous; not owned
};

// Writes the tensors in the given order. Atomic: readers see the old file or the whole new one
// (temporary file in the same folder, fsync, rename, fsync of the folder).
// ERRORS: InvalidArgument (equal or empty names, a negative dimension), IoError (disk full, ...).
void write_safetensors(const std::filesystem::path& path, std::span<const TensorToWrite> tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace certkv
