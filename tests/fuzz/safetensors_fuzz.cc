// The header of a safetensors file. Whatever it is, it is refused with an error that names the
// file, or its tensors tile the data without hole, overlap or rest.
//   input: the size of the file (8 bytes, little endian), then the beginning of the file
#include <cstring>
#include <span>

#include "kernels/base/error.h"
#include "runtime/safetensors.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;

void check(const SafetensorsHeader& header, uint64_t header_end, uint64_t file_bytes) {
  uint64_t end = header_end;
  for (const TensorEntry& t : header.tensors) {
    require(!t.name.empty() || t.name != "__metadata__", "the metadata as a tensor");
    require(t.begin == end, "a hole or an overlap");
    unsigned __int128 elements = 1;  // at most 2^64 after every step, checked below
    for (const int64_t n : t.shape) {
      require(n >= 0, "a negative dimension");
      elements *= uint64_t(n);
      require(elements <= UINT64_MAX, "a product that overflows");
    }
    require(t.shape.size() <= kSafetensorsMaxDimensions, "too many dimensions");
    require(elements == t.elements, "a wrong product");
    require(elements * dtype_bytes(t.dtype) <= file_bytes, "a tensor larger than its file");
    end = t.begin + t.bytes();
    require(end <= file_bytes, "a tensor beyond the end");
    require(!shape_text(t.shape).empty(), "no text");
  }
  require(end == file_bytes, "a rest without a tensor");
}

std::string file_of(const std::string& json, uint64_t data_bytes) {
  const uint64_t header = json.size(), file = 8 + header + data_bytes;
  std::string input(16, '\0');
  std::memcpy(input.data(), &file, 8);
  std::memcpy(input.data() + 8, &header, 8);
  return input + json;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  uint64_t file_bytes = 0;
  std::memcpy(&file_bytes, data, 8);
  const std::span start(reinterpret_cast<const std::byte*>(data) + 8, size - 8);
  // The size as claimed; and the input itself as the whole file. REQUIRES of the parser: `start`
  // holds the header that it announces.
  uint64_t announced = 0;
  if (start.size() >= 8) std::memcpy(&announced, start.data(), 8);
  for (const uint64_t bytes : {file_bytes, uint64_t(start.size())}) {
    if (bytes > start.size() && (start.size() < 8 || announced > start.size() - 8)) continue;
    try {
      check(parse_safetensors_header(start, bytes, "fuzz.safetensors"), 8 + announced, bytes);
      ++fuzz::accepted;
    } catch (const Error& e) {
      require(e.kind() == ErrorKind::BadFile, "refused with an unexpected kind of error");
      require(std::string(e.what()).find("fuzz.safetensors") != std::string::npos,
              "an error without the file's name");
    }
  }
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  return {"SafetensorsFuzz",
          {file_of(R"({"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},)"
                   R"("b":{"dtype":"BF16","shape":[],"data_offsets":[12,14]},)"
                   R"("__metadata__":{"format":"pt"}})",
                   14),
           file_of(R"({"w":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]},)"
                   R"("v":{"dtype":"I64","shape":[3],"data_offsets":[0,24]}}   )",
                   24),
           file_of(R"({"big":{"dtype":"U8","shape":[65536,65536],"data_offsets":[0,4294967296]}})",
                   uint64_t(1) << 32),
           file_of("{}", 0)},
          {"0",
           "1",
           "-1",
           "4294967296",
           "9223372036854775807",
           "18446744073709551615",
           "1e3",
           "2.0",
           "[",
           "]",
           "{",
           "}",
           ",",
           ":",
           "\"",
           "\"a\"",
           "\"dtype\"",
           "\"F64\"",
           "\"BOOL\"",
           "\"shape\"",
           "\"data_offsets\"",
           "\"__metadata__\"",
           "null",
           "true",
           "[0,0]",
           "\\u0000",
           " ",
           "\xff",
           std::string(8, '\0'),
           std::string(8, '\xff')},
          50000};
}
