// Fuzz entry: configuration text from an attacker. Whatever it is, it is refused with a named
// error, or read into values that are allowed and whose echo reads back the same.
//   clang++ -fsanitize=fuzzer,address ... tests/fuzz/options_fuzz.cc
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "kernels/base/error.h"
#include "runtime/options_io.h"

namespace {

using namespace certkv;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "options_fuzz: %s\n", what);
  std::abort();
}

// True if it was read; false if it was refused as it should be.
bool read(OptionTable& table, std::string_view text) {
  try {
    table.read_text(text, "fuzz.yaml");
    return true;
  } catch (const Error& e) {
    require(e.kind() == ErrorKind::InvalidArgument || e.kind() == ErrorKind::BadFile,
            "refused with an unexpected kind of error");
    require(std::string_view(e.what()).substr(0, 10) == "fuzz.yaml:", "an error without a place");
    return false;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  JobOptions options;
  OptionTable table(options);
  const bool accepted = read(table, {reinterpret_cast<const char*>(data), size});
  for (const OptionField& field : table.fields()) {
    require(option_check(field.target, field.doc).empty(), "a value that is not allowed");
  }
  if (!accepted) return 0;
  JobOptions again;
  OptionTable echo(again);
  require(read(echo, table.echo_yaml()), "the echo was refused");
  for (size_t i = 0; i < table.fields().size(); ++i) {
    require(
        option_value_text(table.fields()[i].target) == option_value_text(echo.fields()[i].target),
        "the echo read back differs");
  }
  require(!table.echo_json().empty(), "no JSON");
  return 0;
}
