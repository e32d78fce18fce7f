#include "runtime/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "runtime/checked_math.h"
#include "runtime/json_file.h"

namespace certkv {
namespace {

using nlohmann::json;

constexpr size_t kMaxNameBytes = 512;
constexpr uint64_t kMaxDimension = uint64_t(1) << 48;
constexpr uint64_t kPieceBytes = uint64_t(1) << 20;

std::optional<DType> dtype_of_name(std::string_view name) {
  for (const DType t : {DType::F32, DType::F16, DType::BF16, DType::F64, DType::U8, DType::I8,
                        DType::I32, DType::I64, DType::U64}) {
    if (name == dtype_name(t)) return t;
  }
  return std::nullopt;
}

uint64_t little_endian_u64(const std::byte* at) {
  uint64_t n = 0;
  for (int i = 7; i >= 0; --i) n = n << 8 | std::to_integer<uint64_t>(at[i]);
  return n;
}

uint64_t unsigned_of(const json& value, uint64_t most, const std::string& where) {
  CERTKV_EXPECT(value.is_number_unsigned() && value.get<uint64_t>() <= most, BadFile,
                "{} must be an integer between 0 and {}", where, most);
  return value.get<uint64_t>();
}

TensorEntry entry_of(const std::string& tensor, const json& value, uint64_t data_begin,
                     uint64_t data_bytes, const std::string& file) {
  const std::string where = fmt::format("{}: tensor '{:.80}'", file, tensor);
  CERTKV_EXPECT(!tensor.empty() && tensor.size() <= kMaxNameBytes, BadFile,
                "{}: its name has {} bytes: 1 to {} are allowed", where, tensor.size(),
                kMaxNameBytes);
  CERTKV_EXPECT(value.is_object() && value.size() == 3 && value.contains("dtype") &&
                    value.contains("shape") && value.contains("data_offsets"),
                BadFile, "{}: an object of dtype, shape and data_offsets is needed", where);
  const json &type = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
  TensorEntry t;
  t.name = tensor;

  CERTKV_EXPECT(type.is_string(), BadFile, "{}: dtype must be a text", where);
  const std::optional<DType> dtype = dtype_of_name(type.get_ref<const std::string&>());
  CERTKV_EXPECT(
      dtype.has_value(), BadFile,
      "{}: dtype '{:.40}' is not supported; supported are F64 F32 F16 BF16 I64 I32 I8 U64 U8",
      where, type.get_ref<const std::string&>());
  t.dtype = *dtype;

  CERTKV_EXPECT(shape.is_array() && shape.size() <= kSafetensorsMaxDimensions, BadFile,
                "{}: shape must be a list of at most {} dimensions", where,
                kSafetensorsMaxDimensions);
  t.elements = 1;
  for (const json& d : shape) {
    const uint64_t n = unsigned_of(d, kMaxDimension, where + ": a dimension of shape");
    CERTKV_EXPECT(checked_multiply(t.elements, n, &t.elements), BadFile,
                  "{}: the product of its shape overflows", where);
    t.shape.push_back(int64_t(n));
  }
  uint64_t bytes = 0;
  CERTKV_EXPECT(checked_multiply(t.elements, uint64_t(dtype_bytes(t.dtype)), &bytes), BadFile,
                "{}: its size in bytes overflows", where);

  CERTKV_EXPECT(offsets.is_array() && offsets.size() == 2, BadFile,
                "{}: data_offsets must be a list of two", where);
  const uint64_t begin = unsigned_of(offsets[0], data_bytes, where + ": data_offsets[0]");
  const uint64_t end = unsigned_of(offsets[1], data_bytes, where + ": data_offsets[1]");
  CERTKV_EXPECT(begin <= end, BadFile, "{}: data_offsets [{}, {}] go backwards", where, begin, end);
  CERTKV_EXPECT(end - begin == bytes, BadFile,
                "{}: shape {} of {} takes {} bytes, but data_offsets [{}, {}] hold {}", where,
                shape_text(t.shape), dtype_name(t.dtype), bytes, begin, end, end - begin);
  t.begin = data_begin + begin;
  return t;
}

// pread until all has come; false at the end of the file.
bool read_fully(int fd, void* out, uint64_t count, uint64_t offset, const std::string& where) {
  auto* to = static_cast<std::byte*>(out);
  while (count > 0) {
    const ssize_t got =
        ::pread(fd, to, std::min<uint64_t>(count, uint64_t(1) << 30), off_t(offset));
    if (got < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(got >= 0, BadFile, "{}: cannot be read: {}", where, std::strerror(errno));
    CERTKV_FAILPOINT(safetensors_read);
    if (got == 0 || CERTKV_FAILPOINT_FORCED(safetensors_shrink)) return false;
    to += got;
    offset += uint64_t(got);
    count -= uint64_t(got);
  }
  return true;
}

void to_float(DType type, const std::byte* from, uint64_t count, float* out) {
  if (type == DType::F32) {
    std::memcpy(out, from, count * 4);
    return;
  }
  for (uint64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    out[i] = float_from_16(type, bits);
  }
}

void expect_float_like(const TensorEntry& t, const std::string& path) {
  CERTKV_EXPECT(t.dtype == DType::F32 || t.dtype == DType::F16 || t.dtype == DType::BF16,
                InvalidArgument, "{}: tensor '{:.80}' is {}: F32, F16 or BF16 is needed", path,
                t.name, dtype_name(t.dtype));
}

void expect_range(const TensorEntry& t, uint64_t first, uint64_t count, const std::string& path) {
  CERTKV_EXPECT(first <= t.elements && count <= t.elements - first, InvalidArgument,
                "{}: tensor '{:.80}': elements [{}, {} + {}) lie outside its {}", path, t.name,
                first, first, count, t.elements);
}

}  // namespace

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (const int64_t d : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> start, uint64_t file_bytes,
                                           const std::string& name) {
  CERTKV_EXPECT(file_bytes >= 8 && start.size() >= 8, BadFile,
                "{}: {} bytes are too few for a safetensors file", name, file_bytes);
  const uint64_t header_bytes = little_endian_u64(start.data());
  CERTKV_EXPECT(header_bytes >= 2 && header_bytes <= kSafetensorsMaxHeaderBytes, BadFile,
                "{}: a header of {} bytes is announced: 2 to {} are allowed; this is probably no "
                "safetensors file",
                name, header_bytes, kSafetensorsMaxHeaderBytes);
  CERTKV_EXPECT(header_bytes <= file_bytes - 8 && header_bytes <= start.size() - 8, BadFile,
                "{}: the header of {} bytes does not fit the file of {} bytes: it is truncated",
                name, header_bytes, file_bytes);
  const std::string_view text(reinterpret_cast<const char*>(start.data()) + 8, header_bytes);
  // The format wants the object at once; JSON itself would allow white space before it.
  CERTKV_EXPECT(text.front() == '{', BadFile, "{}: the header does not start with '{{'", name);
  const JsonLimits limits{
      .max_bytes = kSafetensorsMaxHeaderBytes, .max_depth = 3, .max_values = size_t(2) << 20};
  const json root = parse_json(text, name + ": header", limits);
  CERTKV_EXPECT(root.is_object(), BadFile, "{}: the header is no object", name);

  SafetensorsHeader header;
  const uint64_t data_begin = 8 + header_bytes, data_bytes = file_bytes - data_begin;
  for (const auto& [key, value] : root.items()) {
    if (key != "__metadata__") {
      header.tensors.push_back(entry_of(key, value, data_begin, data_bytes, name));
      continue;
    }
    CERTKV_EXPECT(value.is_object(), BadFile, "{}: __metadata__ is no object", name);
    for (const auto& [k, v] : value.items()) {
      CERTKV_EXPECT(v.is_string(), BadFile, "{}: __metadata__ '{:.80}' is no text", name, k);
      header.metadata.emplace(k, v.get<std::string>());
    }
  }

  // A tensor without elements stands before one with elements at the same place.
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const TensorEntry& a, const TensorEntry& b) {
              return std::tuple(a.begin, a.bytes(), std::string_view(a.name)) <
                     std::tuple(b.begin, b.bytes(), std::string_view(b.name));
            });
  uint64_t at = data_begin;
  for (const TensorEntry& t : header.tensors) {
    CERTKV_EXPECT(t.begin == at, BadFile,
                  "{}: tensor '{:.80}' {} the bytes before it: it begins at "
                  "{}, they end at {}",
                  name, t.name, t.begin < at ? "overlaps" : "leaves a hole after",
                  t.begin - data_begin, at - data_begin);
    at += t.bytes();
  }
  CERTKV_EXPECT(
      at == file_bytes, BadFile,
      "{}: the tensors end at byte {}, but the file has {}: it is damaged or was extended", name,
      at, file_bytes);
  return header;
}

// ---- one file -----------------------------------------------------------------------------------

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path.string()) {
  // Not blocking, so that a fifo cannot hang the open.
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  CERTKV_EXPECT(fd_ >= 0, BadFile, "{}: cannot be opened: {}", path_, std::strerror(errno));
  try {
    struct stat s {};
    CERTKV_EXPECT(::fstat(fd_, &s) == 0 && S_ISREG(s.st_mode) && s.st_size >= 0, BadFile,
                  "{}: is no regular file", path_);
    const auto file_bytes = uint64_t(s.st_size);
    std::array<std::byte, 8> length{};
    CERTKV_EXPECT(file_bytes >= 8 && read_fully(fd_, length.data(), 8, 0, path_), BadFile,
                  "{}: {} bytes are too few for a safetensors file", path_, file_bytes);
    // Only what the file really has is asked for; the parser then judges the announced length.
    const uint64_t wanted =
        std::min({little_endian_u64(length.data()), kSafetensorsMaxHeaderBytes, file_bytes - 8});
    std::vector<std::byte> start(8 + wanted);
    CERTKV_EXPECT(read_fully(fd_, start.data(), start.size(), 0, path_), BadFile,
                  "{}: the file shrank while it was read", path_);
    CERTKV_FAILPOINT_BYTES(safetensors_header, start.data(), start.size());
    header_ = parse_safetensors_header(start, file_bytes, path_);
  } catch (...) {
    ::close(fd_);
    throw;
  }
  for (size_t i = 0; i < header_.tensors.size(); ++i) index_.emplace(header_.tensors[i].name, i);
}

SafetensorsFile::~SafetensorsFile() {
  ::close(fd_);
}

const TensorEntry* SafetensorsFile::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &header_.tensors[it->second];
}

const TensorEntry& SafetensorsFile::tensor(std::string_view name) const {
  const TensorEntry* t = find(name);
  CERTKV_EXPECT(t != nullptr, BadFile, "{}: there is no tensor '{:.80}'", path_, name);
  return *t;
}

void SafetensorsFile::read_raw(const TensorEntry& t, uint64_t first, uint64_t count,
                               void* out) const {
  expect_range(t, first, count, path_);
  const uint64_t each = dtype_bytes(t.dtype);
  CERTKV_EXPECT(read_fully(fd_, out, count * each, t.begin + first * each, path_), BadFile,
                "{}: tensor '{:.80}': the file shrank while it was read", path_, t.name);
}

void SafetensorsFile::read_float(const TensorEntry& t, uint64_t first, uint64_t count,
                                 float* out) const {
  expect_float_like(t, path_);
  expect_range(t, first, count, path_);
  if (t.dtype == DType::F32) return read_raw(t, first, count, out);
  const uint64_t piece = std::min(count, kPieceBytes / 2);
  std::vector<std::byte> raw(piece * 2);
  for (uint64_t done = 0; done < count; done += piece) {
    const uint64_t n = std::min(piece, count - done);
    read_raw(t, first + done, n, raw.data());
    to_float(t.dtype, raw.data(), n, out + done);
  }
}

void SafetensorsFile::read_block(const TensorEntry& t, int64_t row, int64_t rows, int64_t column,
                                 int64_t columns, float* out) const {
  expect_float_like(t, path_);
  CERTKV_EXPECT(t.shape.size() == 2, InvalidArgument,
                "{}: tensor '{:.80}' of shape {} is no matrix", path_, t.name, shape_text(t.shape));
  const int64_t r = t.shape[0], c = t.shape[1];
  CERTKV_EXPECT(row >= 0 && rows >= 0 && row <= r && rows <= r - row && column >= 0 &&
                    columns >= 0 && column <= c && columns <= c - column,
                InvalidArgument,
                "{}: tensor '{:.80}': rows [{}, {} + {}), columns [{}, {} + {}) lie outside {}",
                path_, t.name, row, row, rows, column, column, columns, shape_text(t.shape));
  if (rows == 0 || columns == 0) return;
  if (columns == c)
    return read_float(t, uint64_t(row) * uint64_t(c), uint64_t(rows) * uint64_t(c), out);

  const uint64_t each = dtype_bytes(t.dtype), row_bytes = uint64_t(c) * each;
  if (row_bytes > kPieceBytes) {  // long rows: only their part
    for (int64_t i = 0; i < rows; ++i) {
      read_float(t, uint64_t(row + i) * uint64_t(c) + uint64_t(column), uint64_t(columns),
                 out + i * columns);
    }
    return;
  }
  const int64_t piece = std::min<int64_t>(rows, int64_t(kPieceBytes / row_bytes));
  std::vector<std::byte> raw(uint64_t(piece) * row_bytes);
  for (int64_t done = 0; done < rows; done += piece) {
    const int64_t n = std::min(piece, rows - done);
    read_raw(t, uint64_t(row + done) * uint64_t(c), uint64_t(n) * uint64_t(c), raw.data());
    for (int64_t i = 0; i < n; ++i) {
      to_float(t.dtype, raw.data() + uint64_t(i) * row_bytes + uint64_t(column) * each,
               uint64_t(columns), out + (done + i) * columns);
    }
  }
}

// ---- a folder -----------------------------------------------------------------------------------

SafetensorsFolder::SafetensorsFolder(const std::filesystem::path& folder)
    : folder_(folder.string()) {
  constexpr const char* kIndex = "model.safetensors.index.json";
  constexpr const char* kWhole = "model.safetensors";
  constexpr size_t kMaxFiles = 512;  // each stays open
  const auto add = [this](const std::string& file_name) {
    files_.push_back(std::make_unique<SafetensorsFile>(path_in_folder(folder_, file_name)));
    return files_.back().get();
  };
  if (!folder_has(folder_, kIndex)) {
    CERTKV_EXPECT(folder_has(folder_, kWhole), BadFile,
                  "{}: there is neither {} nor {}: weights in safetensors files are needed",
                  folder_, kWhole, kIndex);
    const SafetensorsFile* file = add(kWhole);
    for (const TensorEntry& t : file->header().tensors) places_.emplace(t.name, Place{file, &t});
    return;
  }

  const std::string index_path = path_in_folder(folder_, kIndex);
  const json index = load_json_file(index_path);
  const json& map = json_member(index, "weight_map", index_path);
  CERTKV_EXPECT(map.is_object() && !map.empty(), BadFile,
                "{}: weight_map must be an object that names the file of every tensor", index_path);
  std::map<std::string, const SafetensorsFile*> by_name;
  for (const auto& [tensor, value] : map.items()) {
    CERTKV_EXPECT(value.is_string(), BadFile, "{}: weight_map '{:.80}' is no file name", index_path,
                  tensor);
    const auto& file_name = value.get_ref<const std::string&>();
    auto [at, fresh] = by_name.try_emplace(file_name, nullptr);
    if (fresh) {
      CERTKV_EXPECT(by_name.size() <= kMaxFiles, BadFile, "{}: more than {} files", index_path,
                    kMaxFiles);
      at->second = add(file_name);
    }
    const TensorEntry* entry = at->second->find(tensor);
    CERTKV_EXPECT(entry != nullptr, BadFile, "{}: there is no tensor '{:.80}', though {} says so",
                  at->second->path(), tensor, index_path);
    places_.emplace(tensor, Place{at->second, entry});
  }
  for (const auto& file : files_) {
    for (const TensorEntry& t : file->header().tensors) {
      const Place place = find(t.name);
      CERTKV_EXPECT(place.entry == &t, BadFile, "{}: tensor '{:.80}' is not the one that {} names",
                    file->path(), t.name, index_path);
    }
  }
}

SafetensorsFolder::~SafetensorsFolder() = default;

SafetensorsFolder::Place SafetensorsFolder::find(std::string_view name) const {
  const auto it = places_.find(name);
  return it == places_.end() ? Place{} : it->second;
}

SafetensorsFolder::Place SafetensorsFolder::tensor(std::string_view name) const {
  const Place place = find(name);
  CERTKV_EXPECT(place.entry != nullptr, BadFile, "{}: there is no tensor '{:.80}'", folder_, name);
  return place;
}

}  // namespace certkv
