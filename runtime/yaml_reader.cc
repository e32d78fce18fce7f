#include "runtime/yaml_reader.h"

#include <utf8proc.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <sstream>
#include <unordered_map>

#include "kernels/base/error.h"

namespace certkv {

namespace {

// yaml-cpp takes 0x04 for the end of the stream, so a control character could hide the rest of a
// file; YAML forbids them anyway.
void check_characters(std::string_view text, const std::string& name) {
  int line = 1, column = 1;
  size_t i = 0;
  while (i < text.size()) {
    utf8proc_int32_t code = -1;
    const utf8proc_ssize_t used =
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + i,
                         utf8proc_ssize_t(text.size() - i), &code);
    CERTKV_EXPECT(used > 0, BadFile, "{}:{}:{}: byte 0x{:02x} is not UTF-8; save the file as UTF-8",
                  name, line, column, unsigned(static_cast<unsigned char>(text[i])));
    const bool allowed = code == '\t' || code == '\n' || code == '\r' ||
                         (code >= 0x20 && code != 0x7f && !(code >= 0x80 && code < 0xa0));
    CERTKV_EXPECT(allowed, BadFile,
                  "{}:{}:{}: control character 0x{:02x} is not allowed; in a double-quoted value "
                  "write it as \\x{:02x}",
                  name, line, column, unsigned(code), unsigned(code));
    if (code == '\n') {
      ++line;
      column = 1;
    } else {
      ++column;
    }
    i += size_t(used);
  }
}

bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    utf8proc_int32_t code = -1;
    const utf8proc_ssize_t used =
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + i,
                         utf8proc_ssize_t(text.size() - i), &code);
    if (used <= 0) return false;
    i += size_t(used);
  }
  return true;
}

// Builds the tree. yaml-cpp announces every collection before it descends into it, so throwing
// here bounds its recursion too.
class TreeBuilder final : public YAML::EventHandler {
 public:
  explicit TreeBuilder(const std::string& name) : name_(name) {}

  bool seen_document() const { return documents_ > 0; }
  YamlNode take() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1) refuse(mark, "a second document is not allowed; use one file for each");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    check(mark, "", anchor);
    const bool is_key = expects_key();
    if (is_key) refuse(mark, "a key is missing before ':'");
    add(node(YamlNode::Kind::Null, mark));
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    refuse(mark, "aliases (*name) are not allowed; repeat the value");
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    check(mark, tag, anchor);
    // yaml-cpp makes single bytes of these two escapes, which are no characters in UTF-8.
    if (!is_utf8(value)) {
      refuse(mark, "the escapes \\N and \\_ are not supported; write \\x85 and \\xa0");
    }
    if (expects_key()) {
      Open& map = open_.back();
      const auto [it, fresh] = map.keys.emplace(value, mark.line + 1);
      if (!fresh) {
        refuse(mark, fmt::format("key '{}' is given twice; the first time on line {}", value,
                                 it->second));
      }
      map.key = value;
      map.key_mark = mark;
      map.has_key = true;
      return;
    }
    YamlNode scalar = node(YamlNode::Kind::Scalar, mark);
    scalar.text = value;
    add(std::move(scalar));
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    check(mark, tag, anchor);
    descend(YamlNode::Kind::Sequence, mark);
  }
  void OnSequenceEnd() override { ascend(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    check(mark, tag, anchor);
    descend(YamlNode::Kind::Map, mark);
  }
  void OnMapEnd() override { ascend(); }

 private:
  struct Open {
    YamlNode node;
    std::unordered_map<std::string, int> keys;  // and the line of their first appearance
    std::string key;
    YAML::Mark key_mark;
    bool has_key = false;
  };

  [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& why) const {
    CERTKV_THROW(BadFile, "{}:{}:{}: {}", name_, mark.line + 1, mark.column + 1, why);
  }
  void check(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) const {
    if (anchor != YAML::NullAnchor)
      refuse(mark, "anchors (&name) are not allowed; repeat the value");
    // "?" and "!" are how yaml-cpp says plain and quoted.
    if (!tag.empty() && tag != "?" && tag != "!") {
      refuse(mark, fmt::format("tag '{}' is not allowed; remove it", tag));
    }
  }
  bool expects_key() const {
    return !open_.empty() && open_.back().node.kind == YamlNode::Kind::Map && !open_.back().has_key;
  }
  YamlNode node(YamlNode::Kind kind, const YAML::Mark& mark) const {
    YamlNode n;
    n.kind = kind;
    n.line = mark.line + 1;
    n.column = mark.column + 1;
    return n;
  }
  void add(YamlNode n) {
    if (open_.empty()) {
      root_ = std::move(n);
      return;
    }
    Open& parent = open_.back();
    if (parent.node.kind == YamlNode::Kind::Map) {
      n.key = std::move(parent.key);
      n.key_line = parent.key_mark.line + 1;
      n.key_column = parent.key_mark.column + 1;
      parent.has_key = false;
    }
    parent.node.children.push_back(std::move(n));
  }
  void descend(YamlNode::Kind kind, const YAML::Mark& mark) {
    if (open_.size() >= size_t(kYamlMaxDepth)) {
      refuse(mark, fmt::format("nested deeper than {} levels", kYamlMaxDepth));
    }
    if (expects_key()) refuse(mark, "a key must be a plain word, not a list or map");
    open_.push_back(Open{node(kind, mark), {}, "", {}, false});
  }
  void ascend() {
    YamlNode done = std::move(open_.back().node);
    open_.pop_back();
    add(std::move(done));
  }

  const std::string& name_;
  int documents_ = 0;
  YamlNode root_;
  std::vector<Open> open_;
};

}  // namespace

YamlNode read_yaml(std::string_view text, const std::string& name) {
  CERTKV_EXPECT(text.size() <= kYamlMaxBytes, BadFile, "{}:1:1: {} bytes; at most {} are allowed",
                name, text.size(), kYamlMaxBytes);
  check_characters(text, name);
  TreeBuilder builder(name);
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& e) {
    CERTKV_THROW(BadFile, "{}:{}:{}: not valid YAML: {}", name, std::max(e.mark.line + 1, 1),
                 std::max(e.mark.column + 1, 1), e.msg);
  }
  return builder.take();
}

}  // namespace certkv
