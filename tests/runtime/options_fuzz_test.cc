// Mutations of configuration text, seeded, through the fuzz entry (which aborts on a violation).
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "runtime/options_io.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace certkv {
namespace {

void feed(const std::string& text) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

TEST(OptionsFuzz, MutatedConfigurationsAreRefusedByNameOrReadWell) {
  JobOptions options;
  const std::vector<std::string> seeds{
      OptionTable(options).echo_yaml(),
      "tolerance: {absolute: 1e-3}\nsampling:\n  stop: [\"\\x0a\", 'it''s', plain, '# no', \"\"]\n",
      "compare: [budget, dense]\nmodel: {path: \"a b\", dtype: auto}\n",
      "sampling:\n  stop:\n    - |\n      literal\n    - >-\n      folded\n      text\n    - ~x\n",
      "? policy\n: dense\n...\n",
      "%YAML 1.2\n---\nrun: {resume: true}\n",
  };
  const std::vector<std::string> pieces{"&a ",
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
                                        "\r"};
  std::mt19937_64 random(20260731);
  const auto below = [&random](size_t n) { return size_t(random() % n); };
  for (const std::string& seed : seeds) feed(seed);
  for (int i = 0; i < 1500; ++i) {
    std::string text = seeds[below(seeds.size())];
    for (size_t edits = 1 + below(6); edits > 0; --edits) {
      const size_t at = below(text.size() + 1);
      switch (below(4)) {
        case 0:
          text.insert(at, pieces[below(pieces.size())]);
          break;
        case 1:
          text.erase(at, 1 + below(20));
          break;
        case 2:
          if (at < text.size()) text[at] = char(random());
          break;
        case 3: {
          const std::string copy = text.substr(at, 1 + below(40));
          text.insert(below(text.size() + 1), copy);
          break;
        }
      }
    }
    SCOPED_TRACE(text);
    feed(text);
  }
}

}  // namespace
}  // namespace certkv
