// Configuration text from an attacker.
#include "runtime/yaml_reader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ctime>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"

namespace certkv {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

std::string message_of(const std::string& text) {
  try {
    read_yaml(text, "f");
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::BadFile);
    return e.what();
  }
  return "accepted";
}

std::string repeated(const std::string& part, size_t times) {
  std::string text;
  text.reserve(part.size() * times);
  for (size_t i = 0; i < times; ++i) text += part;
  return text;
}

TEST(YamlReader, BuildsTheTreeWithPositions) {
  const YamlNode root = read_yaml("a: 1\nb:\n  c: [x, 'y z']\n  d: ~\n", "f");
  ASSERT_EQ(root.kind, YamlNode::Kind::Map);
  ASSERT_EQ(root.children.size(), 2u);
  EXPECT_EQ(root.children[0].key, "a");
  EXPECT_EQ(root.children[0].text, "1");
  EXPECT_EQ(root.children[0].column, 4);
  const YamlNode& b = root.children[1];
  ASSERT_EQ(b.children.size(), 2u);
  EXPECT_EQ(b.key_line, 2);
  EXPECT_EQ(b.children[0].key_line, 3);
  EXPECT_EQ(b.children[0].key_column, 3);
  ASSERT_EQ(b.children[0].children.size(), 2u);
  EXPECT_EQ(b.children[0].children[1].text, "y z");
  EXPECT_EQ(b.children[1].kind, YamlNode::Kind::Null);
}

TEST(YamlReader, AnEmptyDocumentIsNull) {
  EXPECT_EQ(read_yaml("", "f").kind, YamlNode::Kind::Null);
  EXPECT_EQ(read_yaml("# only a comment\n", "f").kind, YamlNode::Kind::Null);
  EXPECT_EQ(read_yaml("---\n", "f").kind, YamlNode::Kind::Null);
}

TEST(YamlReader, DepthUpTo64IsRead) {
  EXPECT_EQ(message_of(repeated("[", kYamlMaxDepth) + repeated("]", kYamlMaxDepth)), "accepted");
}

// Each form would descend a hundred thousand levels.
TEST(YamlReader, DeepNestingIsRefusedInEveryForm) {
  std::string indented;
  for (int i = 0; i < 1000; ++i) indented += std::string(size_t(i), ' ') + "a:\n";
  for (const std::string& text :
       {repeated("[", 100000), repeated("{a: ", 100000), repeated("[{", 100000),
        repeated("- ", 100000), repeated("? ", 100000), repeated("- ? ", 50000),
        repeated("[\n", 100000), "a: " + repeated("[", 100000), indented,
        repeated("[", kYamlMaxDepth + 1) + repeated("]", kYamlMaxDepth + 1)}) {
    EXPECT_NE(message_of(text), "accepted") << text.substr(0, 20);
  }
  EXPECT_EQ(message_of(repeated("[", 100) + repeated("]", 100)),
            "f:1:65: nested deeper than 64 levels");
}

TEST(YamlReader, AnchorsAliasesTagsAndSecondDocumentsAreRefused) {
  const struct {
    const char* text;
    const char* message;
  } cases[] = {
      {"a: &x 1\nb: *x\n", "f:1:4: anchors (&name) are not allowed; repeat the value"},
      {"a: &a [x]\nb: &b [*a,*a]\nc: [*b,*b]\n",
       "f:1:4: anchors (&name) are not allowed; repeat the value"},
      {"&a {b: *a}", "f:1:1: anchors (&name) are not allowed; repeat the value"},
      {"a: !!python/object:os.system x", "is not allowed; remove it"},
      {"a: !include other.yaml", "f:1:4: tag '!include' is not allowed; remove it"},
      {"a: 1\n---\nb: 2\n", "a second document is not allowed; use one file for each"},
      {"a: 1\nb: 2\na: 3\n", "f:3:1: key 'a' is given twice; the first time on line 1"},
      {"{a: 1, 'a': 2}", "f:1:8: key 'a' is given twice; the first time on line 1"},
      {"? [a]\n: 1\n", "a key must be a plain word, not a list or map"},
      {"{[a]: 1}", "a key must be a plain word, not a list or map"},
      {": 1", "a key is missing before ':'"},
  };
  for (const auto& c : cases) EXPECT_THAT(message_of(c.text), HasSubstr(c.message)) << c.text;
}

TEST(YamlReader, BrokenTextNamesItsPlace) {
  EXPECT_THAT(message_of("a: [1\nb: 2"), StartsWith("f:2:"));
  EXPECT_THAT(message_of("a: 'open"), HasSubstr("not valid YAML"));
  EXPECT_THAT(message_of("a: b: c"), HasSubstr("f:1:5: not valid YAML"));
  EXPECT_THAT(message_of("a:\n\t- 1"), HasSubstr("f:2:"));
  EXPECT_THAT(message_of("*nowhere"), HasSubstr("f:1:"));
}

// 0x04 ends the stream for yaml-cpp: what follows would be ignored silently.
TEST(YamlReader, ControlCharactersAndOtherEncodingsAreRefused) {
  EXPECT_THAT(message_of("policy: dense\n\x04tolerance: 1\n"),
              StartsWith("f:2:1: control character 0x04 is not allowed"));
  EXPECT_THAT(message_of(std::string("a: b\0c", 6)), StartsWith("f:1:5: control character 0x00"));
  EXPECT_THAT(message_of("a: \x7f"), StartsWith("f:1:4: control character 0x7f"));
  EXPECT_THAT(message_of("a: \xff"), StartsWith("f:1:4: byte 0xff is not UTF-8"));
  EXPECT_THAT(message_of("\xff\xfe" + std::string("a\0:\0", 4)), StartsWith("f:1:1: byte 0xff"));
  EXPECT_THAT(message_of("a: \xc0\x80"), StartsWith("f:1:4: byte 0xc0 is not UTF-8"));
  EXPECT_EQ(message_of("\xef\xbb\xbf"
                       "a: 1\n"),
            "accepted");
  EXPECT_EQ(message_of("a: \"\\x04\"\r\n"), "accepted");
}

TEST(YamlReader, EscapesAreCharactersOrRefused) {
  EXPECT_EQ(read_yaml(R"(["\x85", "\xa0", "\u2028", "\L"])", "f").children[3].text, "\xe2\x80\xa8");
  EXPECT_EQ(read_yaml(R"("\x85")", "f").text, "\xc2\x85");
  for (const char* text : {R"("\N")", R"("a\_b")", R"({"\N": 1})", R"(["\ud800"])"}) {
    EXPECT_THAT(message_of(text), StartsWith("f:1:")) << text;
  }
  EXPECT_THAT(message_of(R"("\N")"), HasSubstr("write \\x85 and \\xa0"));
}

TEST(YamlReader, SizeIsBoundedBeforeParsing) {
  EXPECT_EQ(message_of(std::string(kYamlMaxBytes + 1, '#')),
            "f:1:1: 1048577 bytes; at most 1048576 are allowed");
  EXPECT_EQ(message_of(std::string(kYamlMaxBytes, '#')), "accepted");
}

// The largest text of each kind would take a few seconds; a quarter of it shows that none grows
// much faster than its length. Processor time, so that a busy machine does not matter.
TEST(YamlReader, LargeHostileTextEndsSoon) {
  constexpr size_t kBytes = kYamlMaxBytes / 4;
  constexpr double kSeconds = 4 * kDeadlineFactor;
  std::string keys;
  for (int i = 0; keys.size() + 16 < kBytes; ++i) keys += "k" + std::to_string(i) + ": 1\n";
  for (const std::string& text :
       {keys, repeated("a", kBytes), repeated("- x\n", kBytes / 4),
        "[" + repeated("a,", kBytes / 2 - 1) + "]", repeated("\"", kBytes),
        repeated("? a\n", kBytes / 4), repeated("#\n", kBytes / 2),
        "a: |\n" + repeated(" x\n", kBytes / 3 - 2), repeated(" ", kBytes), repeated("{", kBytes),
        repeated("!", kBytes), repeated(": ", kBytes / 2), repeated("%", kBytes),
        repeated("---\n", kBytes / 4)}) {
    const std::clock_t start = std::clock();
    message_of(text);
    const double took = double(std::clock() - start) / CLOCKS_PER_SEC;
    EXPECT_LT(took, kSeconds) << text.substr(0, 20);
  }
}

}  // namespace
}  // namespace certkv
