// Every key by file and by flag, order of sources, and the echo.
#include "runtime/options_io.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <regex>
#include <set>

#include "kernels/base/error.h"
#include "runtime/byte_size.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

std::vector<std::string> args(std::initializer_list<std::string> list) {
  return list;
}

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (fs::temp_directory_path() / "options_test.XXXXXX").string();
    path_ = mkdtemp(pattern.data());
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  std::string write(const std::string& name, const std::string& text) const {
    const fs::path file = path_ / name;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
    return file.string();
  }
  std::string path(const std::string& name = "") const { return (path_ / name).string(); }

 private:
  fs::path path_;
};

// A value other than the default for each key, as text for a flag; chosen to fit each other.
std::string other_value(const OptionField& field) {
  if (field.key == "store.mode") return "attach";
  if (field.key == "store.arena" || field.key == "run.tier1_memory") return "3GiB";
  if (field.key == "paper.k_min") return "3";
  if (field.key == "tolerance") return "0.01";
  if (field.key == "compare") return "dense,naive";
  if (std::holds_alternative<bool*>(field.target)) {
    return field.default_text == "true" ? "false" : "true";
  }
  if (*field.doc.allowed != '\0') {  // a word that is not the default
    std::string allowed = field.doc.allowed;
    size_t begin = 0;
    while (begin < allowed.size()) {
      const size_t end = std::min(allowed.find(' ', begin), allowed.size());
      const std::string word = allowed.substr(begin, end - begin);
      if (word != field.default_text) return word;
      begin = end + 1;
    }
  }
  if (std::holds_alternative<double*>(field.target)) return "0.625";
  if (std::holds_alternative<std::string*>(field.target)) return "/some/where";
  if (std::holds_alternative<std::vector<std::string>*>(field.target)) return "stop here";
  return "7";
}

std::string nested_yaml(const std::string& key, const std::string& value) {
  const size_t dot = key.find('.');
  if (dot == std::string::npos) return key + ": " + value + "\n";
  return key.substr(0, dot) + ":\n  " + key.substr(dot + 1) + ": " + value + "\n";
}

// What must be given beside a key so that the options fit each other.
std::vector<std::string> companions(const std::string& key) {
  if (key == "store.mode") return {"--store.socket", "/run/s"};
  if (key == "store.socket") return {"--store.mode", "attach"};
  return {};
}

TEST(Options, EveryKeyIsSetByItsFlag) {
  JobOptions defaults;
  const OptionTable known_keys(defaults);
  for (const OptionField& known : known_keys.fields()) {
    JobOptions options;
    OptionTable table(options);
    const std::string value = other_value(known);
    std::vector<std::string> given{"--" + known.key + "=" + value};
    for (const std::string& extra : companions(known.key)) given.push_back(extra);
    table.read_arguments(given);
    for (const OptionField& field : table.fields()) {
      if (field.key == known.key) {
        EXPECT_NE(option_value_text(field.target), known.default_text) << known.key;
        EXPECT_THAT(option_value_text(field.target), HasSubstr(value)) << known.key;
        EXPECT_EQ(field.source.text(), "command line");
      } else if (companions(known.key).empty()) {
        EXPECT_EQ(option_value_text(field.target), field.default_text)
            << known.key << " changed " << field.key;
        EXPECT_EQ(field.source.text(), "default");
      }
    }
  }
}

TEST(Options, EveryKeyIsSetByYaml) {
  JobOptions defaults;
  const OptionTable known_keys(defaults);
  for (const OptionField& known : known_keys.fields()) {
    JobOptions options;
    OptionTable table(options);
    std::string value = other_value(known);
    const std::string expected = value;
    if (known.key == "compare") value = "[" + value + "]";
    table.read_text(nested_yaml(known.key, value), "job.yaml");
    for (const OptionField& field : table.fields()) {
      if (field.key == known.key) {
        EXPECT_THAT(option_value_text(field.target), HasSubstr(expected)) << known.key;
        EXPECT_NE(option_value_text(field.target), known.default_text) << known.key;
        EXPECT_THAT(field.source.text(), testing::StartsWith("job.yaml:")) << known.key;
      } else {
        EXPECT_EQ(option_value_text(field.target), field.default_text)
            << known.key << " changed " << field.key;
      }
    }
  }
}

TEST(Options, FlagsAreUniqueAndDifferFromConfigAndHelp) {
  JobOptions options;
  std::set<std::string> seen{"config", "help"};
  const OptionTable known_keys(options);
  for (const OptionField& field : known_keys.fields()) {
    std::string flags = field.key + " " + field.doc.flags;
    std::set<std::string> own;  // a second flag may repeat the key itself (--policy)
    for (size_t begin = 0; begin < flags.size();) {
      const size_t end = std::min(flags.find(' ', begin), flags.size());
      if (end > begin) own.insert(flags.substr(begin, end - begin));
      begin = end + 1;
    }
    for (const std::string& flag : own) EXPECT_TRUE(seen.insert(flag).second) << flag;
  }
}

TEST(Options, TheDefaultsAreAllowedAndEveryKeySaysWhatItMeans) {
  JobOptions options;
  const OptionTable table(options);
  EXPECT_NO_THROW(table.check());
  for (const OptionField& field : table.fields()) {
    EXPECT_GT(std::string(field.doc.meaning).size(), 10u) << field.key;
    const bool is_number = std::holds_alternative<double*>(field.target) ||
                           std::holds_alternative<int*>(field.target) ||
                           std::holds_alternative<int64_t*>(field.target);
    if (is_number && field.key != "sampling.temperature") {
      EXPECT_STRNE(field.doc.unit, "") << field.key;
    }
    if (is_number) {
      EXPECT_STRNE(field.doc.cost, "") << field.key;
      EXPECT_TRUE(std::isfinite(field.doc.max) || *field.doc.allowed != '\0') << field.key;
    }
  }
}

TEST(Options, VllmNamesAreAliases) {
  JobOptions o;
  OptionTable table(o);
  table.read_arguments(
      args({"--model", "/m", "--dtype", "bfloat16", "--max-model-len", "8192",
            "--tensor-parallel-size", "2", "--data-parallel-size=3", "--kv-cache-dtype", "paper",
            "--seed", "18446744073709551615", "--max-num-seqs", "5"}));
  EXPECT_EQ(o.model.path, "/m");
  EXPECT_EQ(o.model.dtype, "bfloat16");
  EXPECT_EQ(o.model.max_len, 8192);
  EXPECT_EQ(o.parallel.tensor, 2);
  EXPECT_EQ(o.parallel.data, 3);
  EXPECT_EQ(o.cache.layout, "paper");
  EXPECT_EQ(o.sampling.seed, std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(o.run.max_batch, 5);
}

TEST(Options, UnderscoreAndHyphenAreTheSameInFlags) {
  JobOptions o;
  OptionTable(o).read_arguments(args({"--cache.block-tokens", "32", "--ladder.max_rounds=9"}));
  EXPECT_EQ(o.cache.block_tokens, 32);
  EXPECT_EQ(o.ladder.max_rounds, 9);
}

TEST(Options, TheToleranceIsWrittenInFiveWays) {
  const struct {
    std::vector<std::string> flags;
    std::string yaml;
    bool is_relative;
  } cases[] = {
      {{"--tolerance", "0.5"}, "tolerance: 0.5", true},
      {{"--tolerance-relative", "0.5"}, "tolerance: {relative: 0.5}", true},
      {{"--tolerance.relative", "0.5"}, "tolerance:\n  relative: 0.5", true},
      {{"--tolerance-absolute", "0.5"}, "tolerance: {absolute: 0.5}", false},
      {{"--tolerance.absolute", "0.5"}, "tolerance:\n  absolute: 0.5", false},
  };
  for (const auto& c : cases) {
    JobOptions by_flag, by_file;
    OptionTable(by_flag).read_arguments(c.flags);
    EXPECT_EQ(by_flag.tolerance.is_relative, c.is_relative) << c.flags[0];
    EXPECT_EQ(by_flag.tolerance.value, 0.5) << c.flags[0];
    OptionTable(by_file).read_text(c.yaml, "t.yaml");
    EXPECT_EQ(by_file.tolerance.is_relative, c.is_relative) << c.yaml;
    EXPECT_EQ(by_file.tolerance.value, 0.5) << c.yaml;
  }
}

TEST(Options, AnAuditIsOffUnlessAskedForAndItsShareIsChecked) {
  JobOptions o;
  EXPECT_EQ(o.audit.sample, 0);
  OptionTable table(o);
  table.read_text("audit: {sample: 0.01, folder: elsewhere}", "a.yaml");
  EXPECT_EQ(o.audit.sample, 0.01);
  EXPECT_EQ(o.audit.folder, "elsewhere");
  table.read_arguments(args({"--audit.sample", "1.0"}));
  EXPECT_EQ(o.audit.sample, 1);
  for (const char* wrong : {"-0.1", "1.5", "nan"}) {
    JobOptions unchanged;
    OptionTable other(unchanged);
    EXPECT_THROW(other.read_arguments(args({"--audit.sample", wrong})), Error) << wrong;
  }
}

TEST(Options, TheCommandLineOverridesTheFileAndTheFileTheDefault) {
  const TemporaryFolder folder;
  const std::string file =
      folder.write("job.yaml", "tolerance: {absolute: 3}\nsampling: {seed: 4, max_tokens: 9}\n");
  JobOptions o;
  OptionTable table(o);
  // The place of --config among the flags does not matter.
  table.read_arguments(args({"--tolerance", "0.02", "--config", file, "--sampling.seed", "5"}));
  EXPECT_TRUE(o.tolerance.is_relative);
  EXPECT_EQ(o.tolerance.value, 0.02);
  EXPECT_EQ(o.sampling.seed, 5u);
  EXPECT_EQ(o.sampling.max_tokens, 9);
  EXPECT_EQ(o.run.max_batch, JobOptions().run.max_batch);
  EXPECT_EQ(table.source("sampling.seed").text(), "command line");
  EXPECT_EQ(table.source("sampling.max_tokens").text(), file + ":2");
  EXPECT_EQ(table.source("run.max_batch").text(), "default");
  EXPECT_TRUE(table.was_given("tolerance"));
  EXPECT_FALSE(table.was_given("policy"));
}

TEST(Options, LaterFilesOverrideEarlierOnesWholeListsIncluded) {
  const TemporaryFolder folder;
  const std::string a = folder.write("a.yaml", "sampling:\n  stop: [one, two]\n  top_k: 5\n");
  const std::string b = folder.write("b.yaml", "sampling:\n  stop:\n    - three\n");
  JobOptions o;
  OptionTable table(o);
  const auto parsed = table.read_arguments(args({"--config", a, "--config=" + b}));
  EXPECT_EQ(parsed.files, (std::vector<std::string>{a, b}));
  EXPECT_THAT(o.sampling.stop, testing::ElementsAre("three"));
  EXPECT_EQ(o.sampling.top_k, 5);
}

TEST(Options, ARepeatedStopFlagReplacesTheFilesListAndThenAppends) {
  JobOptions o;
  OptionTable table(o);
  table.read_text("sampling: {stop: [from file]}", "f.yaml");
  table.read_arguments(args({"--stop", ".", "--stop", "a,b"}));
  EXPECT_THAT(o.sampling.stop, testing::ElementsAre(".", "a,b"));
}

TEST(Options, TheLastOfARepeatedFlagCounts) {
  JobOptions o;
  OptionTable(o).read_arguments(args({"--seed", "1", "--sampling.seed=2"}));
  EXPECT_EQ(o.sampling.seed, 2u);
}

TEST(Options, ASwitchNeedsNoValue) {
  for (const auto& given : {args({"--run.resume"}), args({"--resume", "true"}),
                            args({"--resume=true", "--deterministic", "false"})}) {
    JobOptions o;
    OptionTable(o).read_arguments(given);
    EXPECT_TRUE(o.run.resume);
    EXPECT_FALSE(o.deterministic);
  }
}

TEST(Options, HelpReadsNothingElse) {
  JobOptions o;
  EXPECT_TRUE(OptionTable(o).read_arguments(args({"--config", "/none", "--help"})).help);
  EXPECT_TRUE(OptionTable(o).read_arguments(args({"--nonsense", "-h"})).help);
}

TEST(Options, HelpNamesEveryKeyWithItsDefault) {
  JobOptions o;
  const OptionTable table(o);
  const std::string help = table.help();
  for (const OptionField& field : table.fields()) {
    EXPECT_THAT(help, HasSubstr("  --" + field.key)) << field.key;
  }
  EXPECT_THAT(std::regex_replace(help, std::regex("\\s+"), " "),
              HasSubstr("[share of S or output norm; default relative 0.05; larger: "));
  EXPECT_THAT(help, HasSubstr("--max-num-seqs"));
  size_t begin = 0;
  while (begin < help.size()) {
    const size_t end = help.find('\n', begin);
    EXPECT_LE(end - begin, 100u) << help.substr(begin, end - begin);
    begin = end + 1;
  }
}

TEST(Options, AFileOfCommentsAndEmptyGroupsKeepsTheDefaults) {
  JobOptions o;
  OptionTable table(o);
  table.read_text("# nothing\n", "c.yaml");
  table.read_text("", "e.yaml");
  table.read_text("store:\n  # mode: attach\nrun: {}\n", "g.yaml");
  for (const OptionField& field : table.fields()) {
    EXPECT_EQ(option_value_text(field.target), field.default_text);
  }
}

TEST(Options, QuotedAndPlainTextAreTheSame) {
  JobOptions o;
  OptionTable(o).read_text("model: {path: \"a b\", max_len: '12'}\npolicy: \"dense\"", "q.yaml");
  EXPECT_EQ(o.model.path, "a b");
  EXPECT_EQ(o.model.max_len, 12);
  EXPECT_EQ(o.policy, Policy::Dense);
}

// The oracle of the echo: a fresh table that has read it back shows the same values.
TEST(Options, TheEchoReadBackGivesTheSameValues) {
  JobOptions defaults;
  std::vector<std::string> given;
  const OptionTable known_keys(defaults);
  for (const OptionField& field : known_keys.fields()) {
    if (field.key == "policy") continue;  // excludes compare
    given.push_back("--" + field.key);
    if (!std::holds_alternative<bool*>(field.target)) given.push_back(other_value(field));
  }
  given.insert(given.end(), {"--stop", "quote \" backslash \\ tab \t newline \n",
                             "--stop=# no comment", "--stop= spaces ", "--stop", "ü \xc2\x85 漢字",
                             "--stop=~", "--stop=null", "--tolerance-absolute", "1e-7"});
  // tolerance was given as a bare number by the loop
  given.erase(std::find(given.begin(), given.end(), "--tolerance"),
              std::find(given.begin(), given.end(), "--tolerance") + 2);
  JobOptions first;
  OptionTable table(first);
  table.read_arguments(given);
  ASSERT_EQ(first.sampling.stop.size(), 7u);
  JobOptions second;
  OptionTable again(second);
  again.read_text(table.echo_yaml(), "echo.yaml");
  for (size_t i = 0; i < table.fields().size(); ++i) {
    EXPECT_EQ(option_value_text(table.fields()[i].target),
              option_value_text(again.fields()[i].target))
        << table.fields()[i].key;
  }
  EXPECT_EQ(first.sampling.stop, second.sampling.stop);
  EXPECT_EQ(first.tolerance.value, second.tolerance.value);
  EXPECT_FALSE(second.tolerance.is_relative);
}

TEST(Options, TheEchoSaysWhereEachValueCameFrom) {
  JobOptions o;
  OptionTable table(o);
  table.read_text("store:\n  linger_seconds: 7\n", "s.yaml");
  table.read_arguments(args({"--seed", "3"}));
  const std::string yaml = table.echo_yaml();
  EXPECT_THAT(yaml, HasSubstr("\n  linger_seconds: 7  # s.yaml:2\n"));
  EXPECT_THAT(yaml, HasSubstr("\n  seed: 3  # command line\n"));
  EXPECT_THAT(yaml, HasSubstr("\ntolerance: {relative: 0.05}  # default\n"));
  const std::string json = table.echo_json();
  EXPECT_THAT(json, HasSubstr("\"store.linger_seconds\": \"s.yaml:2\""));
  EXPECT_THAT(json, HasSubstr("\"linger_seconds\": 7.0"));
  EXPECT_THAT(json, HasSubstr("\"seed\": 3"));
}

TEST(Options, ACommandMayTakeSomeGroupsAndAddKeysOfItsOwn) {
  JobOptions o;
  std::string text;
  OptionTable table(o, {"model", "tolerance"});
  table.add("text", &text, {.meaning = "a file"});
  table.read_arguments(args({"--text", "f.txt", "--model", "/m", "--tolerance", "1"}));
  EXPECT_EQ(text, "f.txt");
  EXPECT_EQ(o.model.path, "/m");
  EXPECT_THROW(table.read_arguments(args({"--seed", "1"})), Error);
}

TEST(Options, PathsAreFoundFromTheWorkingFolderThenTheFilesFolder) {
  const TemporaryFolder folder;
  folder.write("config/in.jsonl", "{}");
  folder.write("config/m/config.json", "{}");
  const std::string file =
      folder.write("config/job.yaml", "model: {path: m}\nrun: {input: in.jsonl}\n");
  JobOptions o;
  OptionTable table(o);
  table.read_arguments(args({"--config", file}));
  table.resolve_paths();
  EXPECT_EQ(o.model.path, folder.path("config/m"));
  EXPECT_EQ(o.run.input, folder.path("config/in.jsonl"));

  const fs::path before = fs::current_path();
  folder.write("work/m/config.json", "{}");
  fs::current_path(folder.path("work"));
  JobOptions near;
  OptionTable near_table(near);
  near_table.read_arguments(args({"--config", file}));
  near_table.resolve_paths();
  fs::current_path(before);
  EXPECT_EQ(near.model.path, "m");
}

TEST(Options, AMissingPathNamesEveryPlaceThatWasTried) {
  const TemporaryFolder folder;
  const std::string file = folder.write("job.yaml", "model:\n  path: no-such-model\n");
  JobOptions o;
  OptionTable table(o);
  table.read_arguments(args({"--config", file}));
  try {
    table.resolve_paths();
    FAIL() << "a missing folder was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::InvalidArgument);
    EXPECT_THAT(e.what(), testing::StartsWith(file +
                                              ":2: model.path is 'no-such-model': no such "
                                              "file or folder; looked for no-such-model, " +
                                              folder.path("no-such-model") + ", "));
    EXPECT_THAT(e.what(), HasSubstr("launcher/demo/no-such-model"));
  }
}

TEST(Options, ValuesSetInCodeAreCheckedToo) {
  for (const double wrong : {std::nan(""), -1.0, double(INFINITY)}) {
    JobOptions o;
    const OptionTable table(o);
    o.tolerance.value = wrong;
    EXPECT_THROW(table.check(), Error) << wrong;
    EXPECT_FALSE(tolerance_allowed(o.tolerance)) << wrong;
  }
  JobOptions o;
  const OptionTable table(o);
  o.cache.block_tokens = 24;
  EXPECT_THROW(table.check(), Error);
}

TEST(ByteSize, ReadsBinaryAndDecimalUnits) {
  EXPECT_EQ(parse_byte_size("4GiB"), uint64_t(4) << 30);
  EXPECT_EQ(parse_byte_size("512MB"), 512000000u);
  EXPECT_EQ(parse_byte_size("1.5 GiB"), uint64_t(3) << 29);
  EXPECT_EQ(parse_byte_size("10kB"), 10000u);
  EXPECT_EQ(parse_byte_size("10KB"), 10000u);
  EXPECT_EQ(parse_byte_size("4096"), 4096u);
  EXPECT_EQ(parse_byte_size("7 B"), 7u);
  EXPECT_EQ(parse_byte_size("8388607TiB"), uint64_t(8388607) << 40);
}

TEST(ByteSize, RefusesEverythingElse) {
  for (const char* wrong :
       {"", "GiB", "-1", "-4GiB", "4 gib", "4GiBB", "4  GiB", " 4", "1e3", "0x10", "nan", "inf",
        "1.2.3MB", ".5GiB", "5.GiB", "8388608TiB", "99999999999999999999", "9999999999.5TiB"}) {
    EXPECT_FALSE(parse_byte_size(wrong).has_value()) << wrong;
  }
}

TEST(ByteSize, IsWrittenForPeople) {
  EXPECT_EQ(byte_size_text(0), "0 B");
  EXPECT_EQ(byte_size_text(1023), "1023 B");
  EXPECT_EQ(byte_size_text(1536), "1.50 KiB");
  EXPECT_EQ(byte_size_text(uint64_t(20) << 30), "20.0 GiB");
}

}  // namespace
}  // namespace certkv
