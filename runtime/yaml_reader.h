// YAML text as a small tree with positions, read from an untrusted buffer.
//
// A subset on purpose: maps, sequences and scalars. Anchors, aliases, tags, merge keys, several
// documents and duplicate keys are refused, so that a short file cannot become a large tree and a
// key cannot mean two things. Nothing is ever included from another file.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace certkv {

inline constexpr size_t kYamlMaxBytes = size_t(1) << 20;
inline constexpr int kYamlMaxDepth = 64;

struct YamlNode {
  enum class Kind { Null, Scalar, Sequence, Map };
  Kind kind = Kind::Null;
  int line = 1, column = 1;  // of its first character, counted from 1
  std::string key;           // where the parent is a map
  int key_line = 1, key_column = 1;
  std::string text;                // of a scalar, quotes removed
  std::vector<YamlNode> children;  // of a sequence or map, in the order of the file
};

// Returns the document's root; Null for an empty document.
// `name` is what errors call the text, usually its file name.
// ERRORS: BadFile "name:line:column: ..." for text that is too large (kYamlMaxBytes) or too deep
// (kYamlMaxDepth), not UTF-8, has control characters, is no YAML, or uses a refused feature.
YamlNode read_yaml(std::string_view text, const std::string& name);

}  // namespace certkv
