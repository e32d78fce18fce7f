#include "runtime/journal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "kernels/base/error.h"
#include "runtime/output_file.h"
#include "runtime/results.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using ::testing::HasSubstr;

struct Record {
  std::string note, result;
  bool operator==(const Record&) const = default;
};

std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}
void spill(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

JournalContents read(const std::string& path, std::vector<Record>& records,
                     const std::string& job = "job") {
  records.clear();
  return read_journal(path, job,
                      [&](std::string_view note, std::string_view result, JournalPosition where) {
                        records.push_back({std::string(note), std::string(result)});
                        EXPECT_EQ(JournalResults(path).read(where), result);
                      });
}

Journal reopen(const std::string& path, const std::string& job = "job") {
  std::vector<Record> ignored;
  return Journal(path, job, read(path, ignored, job));
}

Record record(int i) {
  return {"{\"index\":" + std::to_string(i) + "}",
          "{\"text\":\"" + std::string(size_t(i) * 7 % 50, 'x') + "\"}"};
}

class JournalFile : public ::testing::Test {
 protected:
  test::TempFolder folder_;
  std::string path_ = (folder_ / "replica-0.jsonl").string();
};

TEST_F(JournalFile, GivesBackWhatWasAppendedInOrderAlsoAfterReopening) {
  std::vector<Record> written, found;
  for (int session = 0; session < 3; ++session) {
    Journal journal = reopen(path_);
    for (int i = 0; i < 4; ++i) {
      written.push_back(record(session * 4 + i));
      const JournalPosition where = journal.append(written.back().note, written.back().result);
      EXPECT_EQ(JournalResults(path_).read(where), written.back().result);
    }
  }
  const JournalContents contents = read(path_, found);
  EXPECT_EQ(found, written);
  EXPECT_TRUE(contents.exists);
  EXPECT_EQ(contents.records, 12u);
  EXPECT_EQ(contents.dropped, 0u);
}

TEST_F(JournalFile, AResultThatChangedSinceItWasWrittenIsNotGivenOut) {
  Journal journal = reopen(path_);
  journal.append(record(0).note, record(0).result);
  const JournalPosition where = journal.append(record(1).note, record(1).result);
  const std::string whole = slurp(path_);
  for (uint64_t i = 0; i < where.bytes; ++i) {
    std::string changed = whole;
    changed[where.offset + i] = char(changed[where.offset + i] ^ 0x10);
    spill(path_, changed);
    try {
      JournalResults(path_).read(where);
      ADD_FAILURE() << "byte " << i << " was changed";
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::IoError);
      EXPECT_NE(std::string(e.what()).find("--resume"), std::string::npos);
    }
  }
  spill(path_, whole);
  EXPECT_EQ(JournalResults(path_).read(where), record(1).result);
}

TEST_F(JournalFile, TornAtEveryByteItKeepsTheWholeLinesAndGoesOn) {
  std::vector<size_t> ends;  // of whole lines, the header first
  {
    Journal journal = reopen(path_);
    ends.push_back(slurp(path_).size());
    for (int i = 0; i < 3; ++i) {
      journal.append(record(i).note, record(i).result);
      ends.push_back(slurp(path_).size());
    }
  }
  const std::string whole = slurp(path_);
  for (size_t cut = 0; cut <= whole.size(); ++cut) {
    spill(path_, whole.substr(0, cut));
    size_t lines = 0;
    while (lines < ends.size() && ends[lines] <= cut) ++lines;
    std::vector<Record> found;
    const JournalContents contents = read(path_, found);
    ASSERT_EQ(contents.exists, lines > 0) << "cut at " << cut;
    ASSERT_EQ(found.size(), lines == 0 ? 0 : lines - 1) << "cut at " << cut;
    ASSERT_EQ(contents.dropped, lines > 0 && ends[lines - 1] == cut ? 0u : cut == 0 ? 0u : 1u);
    for (size_t i = 0; i < found.size(); ++i) ASSERT_EQ(found[i], record(int(i)));
    reopen(path_).append(record(9).note, record(9).result);
    ASSERT_EQ(read(path_, found).dropped, 0u);
    ASSERT_EQ(found.back(), record(9)) << "cut at " << cut;
    ASSERT_EQ(found.size(), (lines == 0 ? 0 : lines - 1) + 1);
  }
}

TEST_F(JournalFile, AFlippedBitAnywhereDropsItsLineAndNoOther) {
  {
    Journal journal = reopen(path_);
    for (int i = 0; i < 3; ++i) journal.append(record(i).note, record(i).result);
  }
  const std::string whole = slurp(path_);
  const size_t header_end = whole.find('\n') + 1;
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string damaged = whole;
    damaged[at] = char(damaged[at] ^ 1);
    spill(path_, damaged);
    std::vector<Record> found;
    if (at < header_end) {
      EXPECT_THROW(read(path_, found), Error) << "byte " << at;
      continue;
    }
    const JournalContents contents = read(path_, found);
    // A flipped line feed joins two lines, or ends the last one without one.
    const bool joins = whole[at] == '\n' && at + 1 != whole.size();
    EXPECT_EQ(found.size(), joins ? 1u : 2u) << "byte " << at;
    EXPECT_GE(contents.dropped, 1u);
    for (const Record& r : found) {
      EXPECT_TRUE(r == record(0) || r == record(1) || r == record(2)) << "byte " << at;
    }
  }
}

TEST_F(JournalFile, AJournalOfAnotherJobIsRefused) {
  reopen(path_).append("{}", "{}");
  try {
    reopen(path_, "another");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::InvalidArgument);
    EXPECT_THAT(e.what(), HasSubstr("another job"));
  }
}

TEST_F(JournalFile, ARecordThatWouldBreakTheFramingIsRefused) {
  Journal journal = reopen(path_);
  EXPECT_THROW(journal.append("a\tb", "c"), Error);
  EXPECT_THROW(journal.append("a", "b\nc"), Error);
}

TEST_F(JournalFile, KilledWithoutWarningItHasEveryLineThatWasAcknowledged) {
  for (int round = 0; round < 10; ++round) {
    std::filesystem::remove(path_);
    int acknowledged[2];
    ASSERT_EQ(::pipe(acknowledged), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      Journal journal = reopen(path_);
      for (int i = 0;; ++i) {
        journal.append(record(i).note, record(i).result);
        if (::write(acknowledged[1], &i, sizeof i) != sizeof i) ::_exit(1);
      }
    }
    ::close(acknowledged[1]);
    int last = -1;
    while (last < round * 3)
      ASSERT_EQ(::read(acknowledged[0], &last, sizeof last), ssize_t(sizeof last));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    int next;
    while (::read(acknowledged[0], &next, sizeof next) == ssize_t(sizeof next)) last = next;
    ::close(acknowledged[0]);
    std::vector<Record> found;
    read(path_, found);
    ASSERT_GE(found.size(), size_t(last) + 1);
    for (size_t i = 0; i < found.size(); ++i) ASSERT_EQ(found[i], record(int(i)));
    reopen(path_).append(record(1).note, record(1).result);
    ASSERT_EQ(read(path_, found).dropped, 0u);
  }
}

TEST_F(JournalFile, AFullDiskIsNamedAndLosesNothing) {
  Journal journal = reopen(path_);
  journal.append(record(0).note, record(0).result);
  const std::string before = slurp(path_);
  struct rlimit old {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { rlim_t(before.size() + 20), old.rlim_max };
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string message;
  ErrorKind kind = ErrorKind::Stopped;
  try {
    journal.append("{}", std::string(1000, 'y'));
  } catch (const Error& e) {
    kind = e.kind();
    message = e.what();
  }
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  ::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(kind, ErrorKind::IoError);
  EXPECT_THAT(message, HasSubstr("replica-0.jsonl"));
  EXPECT_THAT(message, HasSubstr("--resume"));
  EXPECT_EQ(slurp(path_), before);
  journal.append(record(1).note, record(1).result);
  std::vector<Record> found;
  EXPECT_EQ(read(path_, found).dropped, 0u);
  EXPECT_EQ(found, (std::vector<Record>{record(0), record(1)}));
}

TEST_F(JournalFile, ResultsAreInInputOrderAsFarAsTheyAreComplete) {
  ResultsIndex index(1);
  Journal journal = reopen(path_);
  const auto finish = [&](uint64_t line) {
    index.add(0, line, {0, journal.append("{}", "{\"line\":" + std::to_string(line) + "}")});
  };
  const std::string out = (folder_ / "results.jsonl").string();
  finish(2);
  EXPECT_EQ(write_results(out, index, 0, {path_}), 0u);
  EXPECT_EQ(slurp(out), "");
  finish(0);
  finish(1);
  finish(4);
  EXPECT_EQ(write_results(out, index, 0, {path_}), 3u);
  EXPECT_EQ(slurp(out), "{\"line\":0}\n{\"line\":1}\n{\"line\":2}\n");
  EXPECT_FALSE(index.add(0, 2, {}));
  finish(3);
  EXPECT_EQ(write_results(out, index, 0, {path_}), 5u);
  EXPECT_EQ(result_file_names({}), std::vector<std::string>{"results.jsonl"});
  EXPECT_EQ(result_file_names({Policy::Budget, Policy::Naive}),
            (std::vector<std::string>{"results-budget.jsonl", "results-naive.jsonl"}));
}

TEST_F(JournalFile, ResultsThatCannotBeWrittenLeaveTheOldOnes) {
  ResultsIndex index(1);
  Journal journal = reopen(path_);
  index.add(0, 0, {0, journal.append("{}", "{\"line\":0}")});
  const std::string out = (folder_ / "results.jsonl").string();
  write_results(out, index, 0, {path_});
  index.add(0, 1, {0, journal.append("{}", std::string(5000, 'z'))});
  struct rlimit old {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small { 1000, old.rlim_max };
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  EXPECT_THROW(write_results(out, index, 0, {path_}), Error);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  ::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(slurp(out), "{\"line\":0}\n");
  for (const auto& entry : std::filesystem::directory_iterator(folder_.path().string())) {
    EXPECT_EQ(entry.path().string().find(".tmp"), std::string::npos);
  }
}

TEST_F(JournalFile, OneFolderHasOneWriter) {
  const FolderLock mine(folder_.path().string());
  const pid_t child = ::fork();
  if (child == 0) {
    try {
      const FolderLock second(folder_.path().string());
    } catch (const Error& e) {
      ::_exit(e.kind() == ErrorKind::InvalidArgument ? 7 : 8);
    }
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

}  // namespace
}  // namespace certkv
