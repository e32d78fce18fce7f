// What is said about wrong configuration, word by word.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "runtime/options_io.h"

namespace certkv {
namespace {

std::string message_of_yaml(const std::string& yaml) {
  JobOptions options;
  OptionTable table(options);
  try {
    table.read_text(yaml, "job.yaml");
    table.check();
  } catch (const Error& e) {
    EXPECT_TRUE(e.kind() == ErrorKind::InvalidArgument || e.kind() == ErrorKind::BadFile);
    return e.what();
  }
  return "accepted";
}

std::string message_of_flags(const std::vector<std::string>& flags) {
  JobOptions options;
  OptionTable table(options);
  try {
    table.read_arguments(flags);
  } catch (const Error& e) {
    EXPECT_TRUE(e.kind() == ErrorKind::InvalidArgument || e.kind() == ErrorKind::BadFile);
    return e.what();
  }
  return "accepted";
}

TEST(OptionErrors, AFileIsToldItsLineAndColumn) {
  const struct {
    const char* yaml;
    const char* message;
  } cases[] = {
      {"polcy: budget", "job.yaml:1:1: unknown key 'polcy'; the nearest known key is 'policy'"},
      {"# c\nparallel:\n  tensr: 2\n",
       "job.yaml:3:3: unknown key 'parallel.tensr'; the nearest known key is 'parallel.tensor'"},
      {"tensor: 2",
       "job.yaml:1:1: unknown key 'tensor'; the nearest known key is "
       "'parallel.tensor'"},
      {"paralel: {tensor: 2}",
       "job.yaml:1:1: unknown key 'paralel'; the nearest known key is 'parallel'"},
      {"parallel.tensor: 2",
       "job.yaml:1:1: key 'parallel.tensor' must be nested in a file: a line "
       "'parallel:', and 'tensor:' indented below"},
      {"tolerance: {relativ: 1}",
       "job.yaml:1:13: unknown key 'tolerance.relativ'; the nearest "
       "known key is 'tolerance.relative'"},
      {"policy: bugdet", "job.yaml:1:9: policy is 'bugdet'; allowed: budget, paper, naive, dense"},
      {"cache:\n  block_tokens: 17\n",
       "job.yaml:2:17: cache.block_tokens is '17'; allowed: 16, 32"},
      {"parallel: {data: 0}",
       "job.yaml:1:18: parallel.data is '0'; allowed: a whole number from 1 "
       "to 4096 (replicas)"},
      {"parallel: {data: 1.5}",
       "job.yaml:1:18: parallel.data is '1.5'; allowed: a whole number "
       "from 1 to 4096 (replicas)"},
      {"parallel: {data: 99999999999999999999}",
       "job.yaml:1:18: parallel.data is '99999999999999999999'; allowed: a whole number from 1 to "
       "4096 (replicas)"},
      {"model: {max_len: -1}",
       "job.yaml:1:18: model.max_len is '-1'; allowed: a whole number from "
       "0 to 1073741824 (tokens)"},
      {"sampling: {seed: -1}",
       "job.yaml:1:18: sampling.seed is '-1'; allowed: a whole number from 0"},
      {"sampling: {top_p: 0}",
       "job.yaml:1:19: sampling.top_p is '0'; allowed: a number above 0 up "
       "to 1 (share)"},
      {"ladder: {max_share: .nan}",
       "job.yaml:1:21: ladder.max_share is '.nan'; allowed: a number from 0 to 1 (share)"},
      {"ladder: {max_share: nan}",
       "job.yaml:1:21: ladder.max_share is 'nan'; allowed: a number from 0 to 1 (share)"},
      {"store: {linger_seconds: inf}",
       "job.yaml:1:25: store.linger_seconds is 'inf'; allowed: a "
       "number from 0 to 86400 (seconds)"},
      {"tolerance: nan",
       "job.yaml:1:12: tolerance is 'nan'; allowed: a number from 0 to 1e+30 (share of S or "
       "output norm), {relative: number} or {absolute: number}"},
      {"tolerance: {relative: -0.1}",
       "job.yaml:1:23: tolerance.relative is '-0.1'; allowed: a number from 0 to 1e+30 (share of S "
       "or output norm)"},
      {"tolerance: {relative: 0.1, absolute: 2}",
       "job.yaml:1:28: tolerance.relative and tolerance.absolute are both given; give one of them"},
      {"tolerance: {}",
       "job.yaml:1:12: tolerance has no value; write {relative: x} or {absolute: x}"},
      {"tolerance: {relative: [1]}", "job.yaml:1:23: tolerance.relative takes a number"},
      {"tolerance: [1]", "job.yaml:1:12: tolerance takes one value, not a list"},
      {"deterministic: yes", "job.yaml:1:16: deterministic is 'yes'; allowed: true or false"},
      {"store: {arena: 4 gigs}",
       "job.yaml:1:16: store.arena is '4 gigs'; allowed: auto, or a size "
       "such as 4GiB or 512MB"},
      {"store: {arena: 0}",
       "job.yaml:1:16: store.arena is '0'; allowed: auto, or a size such as 4GiB or 512MB"},
      {"store: attach", "job.yaml:1:8: store holds keys, not a value; indent its keys below it"},
      {"model: {path: {a: b}}", "job.yaml:1:15: model.path takes a value, not keys"},
      {"model: {path: [a]}", "job.yaml:1:15: model.path takes one value, not a list"},
      {"policy:",
       "job.yaml:1:1: policy has no value; remove the line to keep the default (budget)"},
      {"compare: [dense, dnse]",
       "job.yaml:1:18: compare holds 'dnse'; allowed: budget, paper, naive, dense"},
      {"compare: [dense, dense]",
       "job.yaml:1:10: compare is not allowed; allowed: each at most "
       "once of budget, paper, naive, dense"},
      {"compare: [[dense]]", "job.yaml:1:11: an entry of compare must be a plain value"},
      {"sampling: {stop: ['']}",
       "job.yaml:1:18: sampling.stop is not allowed; allowed: texts of 1 to 4096 bytes"},
      {"- policy", "job.yaml:1:1: the file must hold keys and values, such as 'policy: budget'"},
      {"paper: {k_min: 9, k_max: 8}",
       "job.yaml:1: paper.k_min is 9, above paper.k_max, which is 8 "
       "(job.yaml:1); lower k_min or raise k_max"},
      {"store: {mode: attach}",
       "job.yaml:1: store.mode is attach, but store.socket is empty; name "
       "the socket of the running store"},
      {"store: {socket: /s}",
       "job.yaml:1: store.socket is '/s', but store.mode is auto; set "
       "store.mode to attach, or remove store.socket"},
      {"policy: dense\ncompare: [naive]\n",
       "job.yaml:1: policy is dense, but compare is given too (job.yaml:2); give one of them (an "
       "empty --compare= takes it back)"},
  };
  for (const auto& c : cases) EXPECT_EQ(message_of_yaml(c.yaml), c.message) << c.yaml;
}

TEST(OptionErrors, AFlagIsToldItsName) {
  const struct {
    std::vector<std::string> flags;
    const char* message;
  } cases[] = {
      {{"--tensor-paralel-size", "2"},
       "command line: unknown flag '--tensor-paralel-size'; the "
       "nearest known flag is '--tensor-parallel-size'"},
      {{"--paralel.tensor=2"},
       "command line: unknown flag '--paralel.tensor'; the nearest known "
       "flag is '--parallel.tensor'"},
      {{"--max-batch", "3"},
       "command line: unknown flag '--max-batch'; the nearest known flag is "
       "'--run.max_batch'"},
      {{"-seed", "3"},
       "command line: unknown flag '-seed'; flags begin with two hyphens, the "
       "nearest known flag is '--sampling.seed'"},
      {{"--policy"}, "command line: --policy needs a value; write --policy VALUE"},
      {{"--model", "--seed"}, "command line: --model needs a value; write --model VALUE"},
      {{"--config"}, "command line: --config needs a value; write --config VALUE"},
      {{"job.yaml"}, "command line: unexpected argument 'job.yaml'; keys are given as --key value"},
      {{"--block-size", "64"},
       "command line: --block-size: cache.block_tokens is '64'; allowed: 16, 32"},
      {{"--tolerance-relative", "nan"},
       "command line: --tolerance-relative: tolerance.relative is 'nan'; allowed: a number from 0 "
       "to 1e+30 (share of S "
       "or output norm)"},
      {{"--tolerance", "1", "--tolerance-absolute", "1"},
       "command line: --tolerance and --tolerance-absolute are both given; give one of them"},
      {{"--resume=maybe"}, "command line: --resume: run.resume is 'maybe'; allowed: true or false"},
      {{"--compare", "dense,dens"},
       "command line: --compare: compare is 'dense,dens'; allowed: a "
       "list of budget, paper, naive, dense"},
      {{"--model=\xff"}, "command line: the value of --model is not UTF-8"},
      {{"--paper.k_min", "200"},
       "command line: paper.k_min is 200, above paper.k_max, which is "
       "128 (default); lower k_min or raise k_max"},
      {{"--config", "/no/such.yaml"},
       "/no/such.yaml: cannot be read: No such file or directory; "
       "name an existing file with --config"},
      {{"--config", "/tmp"}, "/tmp: is a folder; name a configuration file"},
  };
  for (const auto& c : cases) EXPECT_EQ(message_of_flags(c.flags), c.message) << c.flags[0];
}

TEST(OptionErrors, AFailedReadLeavesTheValueUnchanged) {
  JobOptions options;
  OptionTable table(options);
  EXPECT_THROW(table.read_text("cache: {block_tokens: 17}", "a.yaml"), Error);
  EXPECT_EQ(options.cache.block_tokens, JobOptions().cache.block_tokens);
  EXPECT_EQ(table.source("cache.block_tokens").text(), "default");
}

TEST(OptionErrors, LongValuesAreShortenedAndControlCharactersShown) {
  const std::string message =
      message_of_yaml("policy: \"\\x1b[31m" + std::string(5000, 'x') + "\"");
  EXPECT_LT(message.size(), 300u);
  EXPECT_EQ(message.find('\x1b'), std::string::npos);
}

TEST(NearestWord, CountsInsertionsDeletionsReplacementsAndSwaps) {
  const std::vector<std::string> words{"run", "ask", "attend", "doctor", "store"};
  EXPECT_EQ(nearest_word("rnu", words), "run");
  EXPECT_EQ(nearest_word("doctr", words), "doctor");
  EXPECT_EQ(nearest_word("sotre", words), "store");
  EXPECT_EQ(nearest_word("atend", words), "attend");
  EXPECT_EQ(nearest_word("", words), "run");
  EXPECT_EQ(nearest_word("x", std::vector<std::string>{}), "");
}

}  // namespace
}  // namespace certkv
