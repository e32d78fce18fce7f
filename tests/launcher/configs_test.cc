// Every committed configuration is read, and its comments say what the program says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "runtime/options_io.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> config_files() {
  std::vector<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(CERTKV_CONFIGS)) {
    if (entry.path().extension() == ".yaml") files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string read_all(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// A key of a file: "#tensor: 0" (its default) or "tensor: 2", and the comment above it.
struct DocumentedKey {
  std::string key, value, comment;
  bool is_commented_out = false;
};

std::vector<DocumentedKey> documented_keys(const std::string& text) {
  std::vector<DocumentedKey> keys;
  std::istringstream lines(text);
  std::string line, group, comment;
  while (std::getline(lines, line)) {
    const size_t indent = std::min(line.find_first_not_of(' '), line.size());
    std::string rest = line.substr(indent);
    if (rest.empty()) {
      comment.clear();
      continue;
    }
    if (rest == "#" || rest.rfind("# ", 0) == 0) {
      comment += (comment.empty() ? "" : " ") + rest.substr(std::min<size_t>(2, rest.size()));
      continue;
    }
    DocumentedKey found;
    found.is_commented_out = rest[0] == '#';
    if (found.is_commented_out) rest.erase(0, 1);
    const size_t colon = rest.find(':');
    if (colon == std::string::npos) {
      ADD_FAILURE() << "neither comment nor key: " << line;
      continue;
    }
    const std::string name = rest.substr(0, colon);
    if (colon + 1 == rest.size()) {
      group = name + ".";
      comment.clear();
      continue;
    }
    found.key = (indent == 0 ? "" : group) + name;
    found.value = rest.substr(colon + 2);
    found.comment = comment;
    comment.clear();
    keys.push_back(found);
  }
  return keys;
}

TEST(Configs, EveryFileIsReadAloneAndItsValuesAreAllowed) {
  ASSERT_GE(config_files().size(), 7u);
  for (const std::string& file : config_files()) {
    JobOptions options;
    OptionTable table(options);
    EXPECT_NO_THROW({
      table.read_file(file);
      table.check();
    }) << file;
  }
}

TEST(Configs, ModelRunAndClusterAreCombined) {
  const std::string root = CERTKV_CONFIGS;
  JobOptions options;
  OptionTable table(options);
  table.read_arguments(std::vector<std::string>{"--config", root + "/models/llama-3.1-8b.yaml",
                                                "--config", root + "/runs/llama-3.1-8b-128k.yaml",
                                                "--config", root + "/clusters/two-nodes.yaml"});
  EXPECT_EQ(options.model.path, "Llama-3.1-8B-Instruct");
  EXPECT_EQ(options.model.max_len, 131072);
  EXPECT_EQ(options.parallel.tensor, 8);
  EXPECT_EQ(options.policy, Policy::Budget);
}

TEST(Configs, ThePolicyOfEveryRunCanBeComparedOnTheCommandLine) {
  for (const std::string& file : config_files()) {
    JobOptions options;
    OptionTable table(options);
    EXPECT_NO_THROW(table.read_arguments(
        std::vector<std::string>{"--config", file, "--compare", "dense,naive"}))
        << file;
  }
}

TEST(Configs, TheReferenceDocumentsEveryKey) {
  std::set<std::string> documented;
  for (const auto& key :
       documented_keys(read_all(std::string(CERTKV_CONFIGS) + "/runs/llama-3.1-8b-128k.yaml"))) {
    EXPECT_TRUE(documented.insert(key.key).second) << key.key << " stands twice";
  }
  JobOptions options;
  for (const OptionTable table(options); const OptionField& field : table.fields()) {
    EXPECT_EQ(documented.count(field.key), 1u) << field.key;
  }
}

TEST(Configs, EveryCommentEndsWithTheMeaningUnitDefaultAndCost) {
  JobOptions options;
  const OptionTable table(options);
  for (const std::string& file : config_files()) {
    for (const DocumentedKey& key : documented_keys(read_all(file))) {
      const auto field = std::find_if(table.fields().begin(), table.fields().end(),
                                      [&](const OptionField& f) { return f.key == key.key; });
      ASSERT_NE(field, table.fields().end()) << file << " documents " << key.key;
      EXPECT_THAT(key.comment, testing::EndsWith(option_text(*field))) << file << " " << key.key;
    }
  }
}

// Read as YAML with the '#' removed, each such line must leave the key at its default.
TEST(Configs, AKeyBehindANumberSignHasItsDefault) {
  size_t seen = 0;
  for (const std::string& file : config_files()) {
    for (const DocumentedKey& key : documented_keys(read_all(file))) {
      if (!key.is_commented_out) continue;
      ++seen;
      const size_t dot = key.key.find('.');
      const std::string yaml =
          dot == std::string::npos
              ? key.key + ": " + key.value
              : key.key.substr(0, dot) + ":\n  " + key.key.substr(dot + 1) + ": " + key.value;
      JobOptions options;
      OptionTable table(options);
      table.read_text(yaml, file);
      EXPECT_TRUE(table.was_given(key.key)) << file << " " << key.key;
      for (const OptionField& field : table.fields()) {
        EXPECT_EQ(option_value_text(field.target), field.default_text) << file << " " << key.key;
      }
    }
  }
  EXPECT_GT(seen, 40u);
}

}  // namespace
}  // namespace certkv
