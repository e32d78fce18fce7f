#include "runtime/options_io.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include "kernels/base/error.h"
#include "runtime/yaml_reader.h"

namespace certkv {

namespace {

namespace fs = std::filesystem;

constexpr const char* kCommandLine = "command line";

class FieldCollector final : public OptionVisitor {
 public:
  FieldCollector(OptionTable& table, std::initializer_list<std::string_view> only)
      : table_(table), only_(only) {}
  void field(const char* name, OptionTarget target, const OptionDoc& doc) override {
    if (wanted(group_.empty() ? std::string_view(name) : group_)) {
      table_.add(group_.empty() ? name : fmt::format("{}.{}", group_, name), target, doc);
    }
  }
  void open(const char* group) override { group_ = group; }
  void close() override { group_ = ""; }

 private:
  bool wanted(std::string_view name) const {
    return only_.size() == 0 || std::find(only_.begin(), only_.end(), name) != only_.end();
  }
  OptionTable& table_;
  std::initializer_list<std::string_view> only_;
  std::string_view group_;
};

std::string with_hyphens(std::string_view name) {
  std::string text(name);
  std::replace(text.begin(), text.end(), '_', '-');
  return text;
}

std::vector<std::string> words_of(const char* text) {
  std::vector<std::string> words;
  for (const char* p = text; *p != '\0';) {
    const char* end = std::strchr(p, ' ');
    const size_t length = end == nullptr ? std::strlen(p) : size_t(end - p);
    if (length > 0) words.emplace_back(p, length);
    p += length + (end != nullptr);
  }
  return words;
}

std::string place(const std::string& name, const YamlNode& node) {
  return fmt::format("{}:{}:{}", name, node.line, node.column);
}
std::string key_place(const std::string& name, const YamlNode& node) {
  return fmt::format("{}:{}:{}", name, node.key_line, node.key_column);
}

// Long or strange values are shortened in messages.
std::string shown(std::string_view value) {
  std::string text;
  for (const char c : value.substr(0, 120)) {
    text += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  return value.size() > 120 ? text + "..." : text;
}

void expect_utf8(std::string_view value, std::string_view flag) {
  size_t i = 0;
  while (i < value.size()) {
    utf8proc_int32_t code = -1;
    const utf8proc_ssize_t used =
        utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(value.data()) + i,
                         utf8proc_ssize_t(value.size() - i), &code);
    CERTKV_EXPECT(used > 0, InvalidArgument, "{}: the value of --{} is not UTF-8", kCommandLine,
                  flag);
    i += size_t(used);
  }
}

}  // namespace

std::string OptionSource::text() const {
  switch (kind) {
    case Kind::Default:
      return "default";
    case Kind::File:
      return fmt::format("{}:{}", file, line);
    case Kind::CommandLine:
      return kCommandLine;
  }
  return "unknown";
}

OptionTable::OptionTable(JobOptions& options) : OptionTable(options, {}) {}

OptionTable::OptionTable(JobOptions& options, std::initializer_list<std::string_view> only)
    : job_(&options) {
  FieldCollector collector(*this, only);
  visit_options(options, collector);
}

void OptionTable::add(std::string key, OptionTarget target, const OptionDoc& doc) {
  std::string text = option_value_text(target);
  fields_.push_back({std::move(key), target, doc, std::move(text), {}});
}

const OptionField* OptionTable::find(std::string_view key) const {
  for (const OptionField& field : fields_) {
    if (field.key == key) return &field;
  }
  return nullptr;
}
OptionField* OptionTable::find(std::string_view key) {
  return const_cast<OptionField*>(std::as_const(*this).find(key));
}

bool OptionTable::is_group(std::string_view path) const {
  return std::any_of(fields_.begin(), fields_.end(), [path](const OptionField& field) {
    return field.key.size() > path.size() && field.key.compare(0, path.size(), path) == 0 &&
           field.key[path.size()] == '.';
  });
}

const OptionSource& OptionTable::source(std::string_view key) const {
  const OptionField* field = find(key);
  CERTKV_EXPECT(field != nullptr, InvalidArgument, "'{}' is no key of this command", key);
  return field->source;
}

// ---- files --------------------------------------------------------------------------------------

// A key given without its group ("tensor: 2" for parallel.tensor) is nearer to its own last part.
std::string OptionTable::nearest_key(std::string_view path) const {
  std::vector<std::string> keys;
  for (const OptionField& field : fields_) {
    const size_t dot = field.key.rfind('.');
    if (dot != std::string::npos && field.key.substr(dot + 1) == path) return field.key;
    keys.push_back(field.key);
    if (std::holds_alternative<Tolerance*>(field.target)) {
      keys.push_back(field.key + ".relative");
      keys.push_back(field.key + ".absolute");
    }
    if (dot != std::string::npos) keys.push_back(field.key.substr(0, dot));
  }
  return nearest_word(path, keys);
}

void OptionTable::read_file(const std::string& path) {
  std::error_code error;
  CERTKV_EXPECT(!fs::is_directory(path, error), BadFile,
                "{}: is a folder; name a configuration file", path);
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  CERTKV_EXPECT(file.good(), BadFile, "{}: cannot be read: {}; name an existing file with --config",
                path, std::strerror(errno));
  std::string text(kYamlMaxBytes + 1, '\0');
  file.read(text.data(), std::streamsize(text.size()));
  CERTKV_EXPECT(!file.bad(), BadFile, "{}: reading failed: {}", path, std::strerror(errno));
  text.resize(size_t(file.gcount()));
  read_text(text, path);
}

void OptionTable::read_text(std::string_view yaml, const std::string& name) {
  const YamlNode root = read_yaml(yaml, name);
  if (root.kind == YamlNode::Kind::Null) return;  // comments only
  CERTKV_EXPECT(root.kind == YamlNode::Kind::Map, InvalidArgument,
                "{}: the file must hold keys and values, such as 'policy: budget'",
                place(name, root));
  read_map(root, "", name);
}

void OptionTable::read_map(const YamlNode& map, const std::string& prefix,
                           const std::string& name) {
  for (const YamlNode& node : map.children) {
    const std::string path = prefix + node.key;
    OptionField* field = node.key.find('.') == std::string::npos ? find(path) : nullptr;
    if (field == nullptr && node.key.find('.') == std::string::npos && is_group(path)) {
      if (node.kind == YamlNode::Kind::Null) continue;  // all of its keys are commented out
      CERTKV_EXPECT(node.kind == YamlNode::Kind::Map, InvalidArgument,
                    "{}: {} holds keys, not a value; indent its keys below it", place(name, node),
                    path);
      read_map(node, path + ".", name);
      continue;
    }
    if (field == nullptr) {
      CERTKV_EXPECT(find(path) == nullptr, InvalidArgument,
                    "{}: key '{}' must be nested in a file: a line '{}:', and '{}:' indented below",
                    key_place(name, node), shown(path), path.substr(0, path.rfind('.')),
                    path.substr(path.rfind('.') + 1));
      CERTKV_THROW(InvalidArgument, "{}: unknown key '{}'; the nearest known key is '{}'",
                   key_place(name, node), shown(path), nearest_key(path));
    }
    const std::string at = place(name, node);
    CERTKV_EXPECT(node.kind != YamlNode::Kind::Null, InvalidArgument,
                  "{}: {} has no value; remove the line to keep the default ({})",
                  key_place(name, node), path, field->default_text);
    if (std::holds_alternative<Tolerance*>(field->target) && node.kind == YamlNode::Kind::Map) {
      read_tolerance(*field, node, name);
    } else if (node.kind == YamlNode::Kind::Sequence) {
      const bool list = std::holds_alternative<std::vector<Policy>*>(field->target) ||
                        std::holds_alternative<std::vector<std::string>*>(field->target);
      CERTKV_EXPECT(list, InvalidArgument, "{}: {} takes one value, not a list", at, path);
      std::vector<std::string> strings;
      std::vector<Policy> policies;
      for (const YamlNode& entry : node.children) {
        CERTKV_EXPECT(entry.kind == YamlNode::Kind::Scalar, InvalidArgument,
                      "{}: an entry of {} must be a plain value", place(name, entry), path);
        if (std::holds_alternative<std::vector<Policy>*>(field->target)) {
          Policy policy = Policy::Budget;
          const std::string wrong = option_set(&policy, field->doc, entry.text);
          CERTKV_EXPECT(wrong.empty(), InvalidArgument, "{}: {} holds '{}'; allowed: {}",
                        place(name, entry), path, shown(entry.text), wrong);
          policies.push_back(policy);
        } else {
          strings.push_back(entry.text);
        }
      }
      const bool is_policies = std::holds_alternative<std::vector<Policy>*>(field->target);
      const std::string wrong =
          is_policies ? option_check(&policies, field->doc) : option_check(&strings, field->doc);
      CERTKV_EXPECT(wrong.empty(), InvalidArgument, "{}: {} is not allowed; allowed: {}", at, path,
                    wrong);
      if (is_policies) {
        *std::get<std::vector<Policy>*>(field->target) = std::move(policies);
      } else {
        *std::get<std::vector<std::string>*>(field->target) = std::move(strings);
      }
    } else {
      CERTKV_EXPECT(node.kind == YamlNode::Kind::Scalar, InvalidArgument,
                    "{}: {} takes a value, not keys", at, path);
      const std::string wrong = option_set(field->target, field->doc, node.text);
      CERTKV_EXPECT(wrong.empty(), InvalidArgument, "{}: {} is '{}'; allowed: {}", at, path,
                    shown(node.text), wrong);
    }
    field->source = {OptionSource::Kind::File, name, node.key_line, node.key_column};
  }
}

void OptionTable::read_tolerance(OptionField& field, const YamlNode& map, const std::string& name) {
  CERTKV_EXPECT(!map.children.empty(), InvalidArgument,
                "{}: {} has no value; write {{relative: x}} or {{absolute: x}}", place(name, map),
                field.key);
  const YamlNode* first = nullptr;
  for (const YamlNode& node : map.children) {
    const std::string path = field.key + "." + node.key;
    const bool known = node.key == "relative" || node.key == "absolute";
    CERTKV_EXPECT(known, InvalidArgument, "{}: unknown key '{}'; the nearest known key is '{}'",
                  key_place(name, node), shown(path), nearest_key(path));
    CERTKV_EXPECT(first == nullptr, InvalidArgument,
                  "{}: {}.{} and {}.{} are both given; give one of them", key_place(name, node),
                  field.key, first == nullptr ? "" : first->key, field.key, node.key);
    first = &node;
    CERTKV_EXPECT(node.kind == YamlNode::Kind::Scalar, InvalidArgument, "{}: {} takes a number",
                  place(name, node), path);
    const std::string wrong = option_set(field.target, field.doc, node.text);
    CERTKV_EXPECT(wrong.empty(), InvalidArgument, "{}: {} is '{}'; allowed: {}", place(name, node),
                  path, shown(node.text), wrong.substr(0, wrong.find(',')));
    std::get<Tolerance*>(field.target)->is_relative = node.key == "relative";
  }
}

// ---- flags --------------------------------------------------------------------------------------

bool OptionTable::find_flag(std::string_view name, Flag& flag) const {
  const std::string wanted = with_hyphens(name);
  for (size_t i = 0; i < fields_.size(); ++i) {
    const OptionField& field = fields_[i];
    const std::string key = with_hyphens(field.key);
    flag = {i, ""};
    if (wanted == key) return true;
    for (const std::string& alias : words_of(field.doc.flags)) {
      if (wanted == alias) return true;
    }
    if (!std::holds_alternative<Tolerance*>(field.target)) continue;
    for (const char* part : {"relative", "absolute"}) {
      flag.part = part;
      if (wanted == fmt::format("{}-{}", key, part)) return true;
      if (wanted == fmt::format("{}.{}", key, part)) return true;
    }
  }
  return false;
}

std::string OptionTable::nearest_flag(std::string_view name) const {
  std::vector<std::string> names{"config", "help"};
  for (const OptionField& field : fields_) {
    const size_t dot = field.key.rfind('.');
    if (dot != std::string::npos && with_hyphens(field.key.substr(dot + 1)) == with_hyphens(name)) {
      return field.key;
    }
    names.push_back(field.key);
    for (std::string& alias : words_of(field.doc.flags)) names.push_back(std::move(alias));
    if (std::holds_alternative<Tolerance*>(field.target)) {
      for (const char* part : {"-relative", "-absolute"}) names.push_back(field.key + part);
    }
  }
  return nearest_word(name, names);
}

void OptionTable::read_flag(std::string_view name, const Flag& flag, const std::string& value,
                            bool first) {
  OptionField& field = fields_[flag.field];
  expect_utf8(value, name);
  std::string wrong;
  auto* const* strings = std::get_if<std::vector<std::string>*>(&field.target);
  if (strings != nullptr && !first && !value.empty()) {  // repeated: one more entry
    std::vector<std::string> longer = **strings;
    longer.push_back(value);
    wrong = option_check(&longer, field.doc);
    if (wrong.empty()) **strings = std::move(longer);
  } else {
    wrong = option_set(field.target, field.doc, value);
  }
  const std::string key =
      flag.part.empty() ? field.key : fmt::format("{}.{}", field.key, flag.part);
  if (!flag.part.empty()) wrong = wrong.substr(0, wrong.find(','));
  CERTKV_EXPECT(wrong.empty(), InvalidArgument, "{}: --{}: {} is '{}'; allowed: {}", kCommandLine,
                name, key, shown(value), wrong);
  if (flag.part == "absolute") std::get<Tolerance*>(field.target)->is_relative = false;
  field.source = {OptionSource::Kind::CommandLine, "", 0, 0};
}

OptionTable::Parsed OptionTable::read_arguments(std::span<const std::string> arguments,
                                                size_t max_positional) {
  struct Given {
    std::string name;
    Flag flag;
    std::string value;
  };
  Parsed parsed;
  for (const std::string& argument : arguments) {
    if (argument == "--") break;
    parsed.help = parsed.help || argument == "--help" || argument == "-h";
  }
  if (parsed.help) return parsed;
  std::vector<Given> given;
  bool flags_ended = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (!flags_ended && argument == "--") {
      flags_ended = true;
      continue;
    }
    if (flags_ended || argument.size() < 2 || argument[0] != '-') {
      CERTKV_EXPECT(parsed.positional.size() < max_positional, InvalidArgument,
                    "{}: unexpected argument '{}'; keys are given as --key value", kCommandLine,
                    shown(argument));
      parsed.positional.push_back(argument);
      continue;
    }
    CERTKV_EXPECT(argument[1] == '-', InvalidArgument,
                  "{}: unknown flag '{}'; flags begin with two hyphens, the nearest known flag is "
                  "'--{}'",
                  kCommandLine, shown(argument), nearest_flag(argument.substr(1)));
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    Flag flag{};
    const bool is_config = name == "config";
    CERTKV_EXPECT(is_config || find_flag(name, flag), InvalidArgument,
                  "{}: unknown flag '--{}'; the nearest known flag is '--{}'", kCommandLine,
                  shown(name), nearest_flag(name));
    const bool is_switch = !is_config && std::holds_alternative<bool*>(fields_[flag.field].target);
    std::string value;
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (is_switch) {
      const bool has_value =
          i + 1 < arguments.size() && (arguments[i + 1] == "true" || arguments[i + 1] == "false");
      value = has_value ? arguments[++i] : "true";
    } else {
      CERTKV_EXPECT(i + 1 < arguments.size() && arguments[i + 1].rfind("--", 0) != 0,
                    InvalidArgument, "{}: --{} needs a value; write --{} VALUE", kCommandLine, name,
                    name);
      value = arguments[++i];
    }
    if (is_config) {
      parsed.files.push_back(value);
    } else {
      given.push_back({name, flag, value});
    }
  }

  for (const std::string& file : parsed.files) read_file(file);
  std::map<size_t, Given> seen;  // the last flag given of each field
  for (const Given& g : given) {
    const auto before = seen.find(g.flag.field);
    if (before != seen.end() && std::holds_alternative<Tolerance*>(fields_[g.flag.field].target)) {
      const bool absolute_before = before->second.flag.part == "absolute";
      CERTKV_EXPECT(absolute_before == (g.flag.part == "absolute"), InvalidArgument,
                    "{}: --{} and --{} are both given; give one of them", kCommandLine,
                    before->second.name, g.name);
    }
    read_flag(g.name, g.flag, g.value, before == seen.end());
    seen.insert_or_assign(g.flag.field, g);
  }
  check();
  return parsed;
}

// ---- checks and paths ---------------------------------------------------------------------------

void OptionTable::check() const {
  for (const OptionField& field : fields_) {
    const std::string wrong = option_check(field.target, field.doc);
    CERTKV_EXPECT(wrong.empty(), InvalidArgument, "{}: {} is '{}'; allowed: {}",
                  field.source.text(), field.key, shown(option_value_text(field.target)), wrong);
  }
  if (job_ == nullptr) return;
  const JobOptions& job = *job_;
  const auto at = [this](std::string_view key) {
    const OptionField* field = find(key);
    return field == nullptr ? std::string("default") : field->source.text();
  };
  CERTKV_EXPECT(job.paper.k_min <= job.paper.k_max, InvalidArgument,
                "{}: paper.k_min is {}, above paper.k_max, which is {} ({}); lower k_min or raise "
                "k_max",
                at("paper.k_min"), job.paper.k_min, job.paper.k_max, at("paper.k_max"));
  CERTKV_EXPECT(job.store.mode != "attach" || !job.store.socket.empty(), InvalidArgument,
                "{}: store.mode is attach, but store.socket is empty; name the socket of the "
                "running store",
                at("store.mode"));
  CERTKV_EXPECT(job.store.mode == "attach" || job.store.socket.empty(), InvalidArgument,
                "{}: store.socket is '{}', but store.mode is {}; set store.mode to attach, or "
                "remove store.socket",
                at("store.socket"), shown(job.store.socket), job.store.mode);
  const bool both = find("policy") != nullptr && find("compare") != nullptr &&
                    was_given("policy") && !job.compare.empty();
  CERTKV_EXPECT(!both, InvalidArgument,
                "{}: policy is {}, but compare is given too ({}); give one of them (an empty "
                "--compare= takes it back)",
                at("policy"), policy_name(job.policy), at("compare"));
}

void OptionTable::resolve_paths() {
  for (OptionField& field : fields_) {
    if (!field.doc.path) continue;
    std::string& path = *std::get<std::string*>(field.target);
    if (path.empty()) continue;
    std::vector<std::string> places{path};
    if (fs::path(path).is_relative()) {
      if (field.source.kind == OptionSource::Kind::File) {
        places.push_back((fs::path(field.source.file).parent_path() / path).string());
      }
      if (field.key == "model.path") {
        for (const std::string& folder : demo_folders()) {
          places.push_back((fs::path(folder) / path).string());
        }
      }
    }
    std::error_code error;
    const auto found = std::find_if(places.begin(), places.end(), [&error](const std::string& p) {
      return fs::exists(p, error);
    });
    CERTKV_EXPECT(found != places.end(), InvalidArgument,
                  "{}: {} is '{}': no such file or folder; looked for {}", field.source.text(),
                  field.key, shown(path), fmt::join(places, ", "));
    path = *found;
  }
}

std::vector<std::string> demo_folders() {
  std::vector<std::string> folders;
  if (const char* named = std::getenv("CERTKV_DEMO"); named != nullptr && *named != '\0') {
    folders.emplace_back(named);
  }
  std::error_code error;
  const fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  if (error) return folders;
  for (const char* place : {"../share/certkv/demo", "../../launcher/demo", "../demo"}) {
    folders.push_back((folder / place).lexically_normal().string());
  }
  return folders;
}

}  // namespace certkv
