// Options of a command from YAML files and flags: command line over files over defaults.
//
//   JobOptions options;
//   OptionTable table(options);
//   const auto parsed = table.read_arguments(arguments);   // reads --config files first
//   if (parsed.help) { fmt::print("{}", table.help()); return 0; }
//   table.resolve_paths();
//
// Files nest keys (`parallel: {tensor: 2}`); every key is also a flag by its dotted path
// (`--parallel.tensor 2`, `--parallel.tensor=2`), '_' and '-' being the same in flags. Some have a
// second flag, named as vLLM names it (options_visit.h). `--config FILE` may be repeated; a later
// file overrides an earlier one, whole lists included. A switch needs no value on the command line.
//
// ERRORS: every message begins with where the value came from: "job.yaml:4:11: ..." or
// "command line: ...". InvalidArgument for unknown keys (naming the nearest known one) and for
// values that are not allowed (naming key, value and what is allowed); BadFile for text that is no
// acceptable YAML (yaml_reader.h) or cannot be read.
// THREADS: a table belongs to one thread.
#pragma once

#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/options.h"
#include "runtime/options_visit.h"

namespace certkv {

struct OptionSource {
  enum class Kind { Default, File, CommandLine };
  Kind kind = Kind::Default;
  std::string file;          // of a File
  int line = 0, column = 0;  // of a File, counted from 1
  std::string text() const;  // "default", "job.yaml:4", "command line"
};

struct OptionField {
  std::string key;  // dotted path
  OptionTarget target;
  OptionDoc doc;
  std::string default_text;  // value_text(target) when the field was added
  OptionSource source;
};

class OptionTable {
 public:
  // An empty table, for a command with keys of its own.
  OptionTable() = default;

  // All keys of a job, or those of the named groups and top-level keys ({"model", "policy"}).
  // REQUIRES options outlives the table.
  explicit OptionTable(JobOptions& options);
  OptionTable(JobOptions& options, std::initializer_list<std::string_view> only);

  // A key of the command's own. Its present value is the default.
  void add(std::string key, OptionTarget target, const OptionDoc& doc);

  struct Parsed {
    bool help = false;                    // --help or -h was given; nothing else was read
    std::vector<std::string> positional;  // what is no flag, in order
    std::vector<std::string> files;       // of --config
  };
  // Reads --config files, then flags, then checks everything (check()).
  // Positional arguments beyond `max_positional` are refused.
  Parsed read_arguments(std::span<const std::string> arguments, size_t max_positional = 0);

  void read_file(const std::string& path);
  void read_text(std::string_view yaml, const std::string& name);  // `name`: what errors call it

  // Every value within its limits, and the values fit each other.
  void check() const;

  // Replaces relative paths (model.path, run.input) by where they were found: working folder,
  // folder of the configuration file that named them, demo models. Throws InvalidArgument naming
  // all places when there is none. Empty paths stay empty.
  void resolve_paths();

  const OptionSource& source(std::string_view key) const;  // REQUIRES a known key
  bool was_given(std::string_view key) const {
    return source(key).kind != OptionSource::Kind::Default;
  }
  const std::vector<OptionField>& fields() const { return fields_; }

  std::string help() const;       // each key: flags, meaning, unit, default, allowed, cost
  std::string echo_yaml() const;  // all values, nested, their source as a comment; can be read back
  std::string echo_json() const;  // {"options": {nested}, "sources": {"dotted.key": "job.yaml:4"}}

 private:
  struct Flag {
    size_t field;
    std::string_view part;  // of a tolerance: relative, absolute or empty
  };
  const OptionField* find(std::string_view key) const;
  OptionField* find(std::string_view key);
  bool is_group(std::string_view path) const;
  bool find_flag(std::string_view name, Flag& flag) const;
  std::string nearest_key(std::string_view path) const;
  std::string nearest_flag(std::string_view name) const;
  void read_map(const struct YamlNode& map, const std::string& prefix, const std::string& name);
  void read_tolerance(OptionField& field, const struct YamlNode& node, const std::string& name);
  void read_flag(std::string_view name, const Flag& flag, const std::string& value, bool first);

  JobOptions* job_ = nullptr;
  std::vector<OptionField> fields_;
};

// ---- pieces that are useful by themselves -------------------------------------------------------

// What --help says below a key: "meaning [unit; default x; larger: cost]". The comments in configs/
// end with it (tests/launcher/configs_test.cc).
std::string option_text(const OptionField& field);

// The value as text: "0.05", "true", "budget,dense", "relative 0.05".
std::string option_value_text(const OptionTarget& target);

// Sets the value from text. Returns "" or what is allowed ("a whole number from 0 to 64 (rounds)");
// the value is unchanged then.
std::string option_set(const OptionTarget& target, const OptionDoc& doc, std::string_view text);

// "" or what is allowed; NaN is never allowed.
std::string option_check(const OptionTarget& target, const OptionDoc& doc);

// The word of `candidates` with the fewest insertions, deletions, replacements and swaps of
// neighbours from `word`; the first of several; "" if there are no candidates.
std::string nearest_word(std::string_view word, std::span<const std::string> candidates);

// Folders in which the demo models may lie: CERTKV_DEMO where it is set, then places relative to the
// running program (installed, built in the clone, made by the quickstart).
std::vector<std::string> demo_folders();

}  // namespace certkv
