// Configuration text. Whatever it is, it is refused with a named error, or read into values that
// are allowed and whose echo reads back the same.
#include <string_view>

#include "kernels/base/error.h"
#include "runtime/options_io.h"
#include "tests/fuzz/target.h"

namespace {

using namespace certkv;
using certkv::fuzz::require;

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
  const bool read_well = read(table, {reinterpret_cast<const char*>(data), size});
  for (const OptionField& field : table.fields()) {
    require(option_check(field.target, field.doc).empty(), "a value that is not allowed");
  }
  if (!read_well) return 0;
  ++fuzz::accepted;
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

certkv::fuzz::Plan certkv::fuzz::plan() {
  JobOptions options;
  return {
      "OptionsFuzz",
      {OptionTable(options).echo_yaml(),
       "tolerance: {absolute: 1e-3}\nsampling:\n  stop: [\"\\x0a\", 'it''s', plain, '# no']\n",
       "compare: [budget, dense]\nmodel: {path: \"a b\", dtype: auto}\n",
       "sampling:\n  stop:\n    - |\n      literal\n    - >-\n      folded\n      text\n    - ~x\n",
       "? policy\n: dense\n...\n", "%YAML 1.2\n---\nrun: {resume: true}\n"},
      {"\"\"",
       "&a ",
       "*a",
       "!!str ",
       "[",
       "]",
       "{",
       "}",
       ": ",
       "- ",
       "? ",
       "|\n",
       ">\n",
       "'",
       "\"",
       "\\x",
       "\\u0000",
       "\n",
       "\t",
       "#",
       "---\n",
       "...\n",
       "%",
       ",",
       "~",
       "null",
       ".nan",
       "1e999",
       "-0",
       "\xef\xbb\xbf",
       "\xc2\x85",
       "\xe2\x80\xa8",
       "\x04",
       std::string(1, '\0'),
       "<<: ",
       "tolerance",
       "18446744073709551616",
       "0x10",
       "1_000",
       "\xff",
       "\r"},
      15000};
}
