// Which command runs, and with which exit code errors end.
#include "launcher/commands.h"
#include "kernels/attend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "kvstore/store_process.h"
#include "launcher/machine.h"
#include "parallel/installed_libraries.h"

namespace certkv {
namespace {

using testing::HasSubstr;

// What a command prints, and its exit code; -1 and the message where it throws.
struct Result {
  int code = -1;
  std::string text;
};

Result run(const std::vector<std::string>& line) {
  Result result;
  Args args;
  testing::internal::CaptureStdout();
  try {
    result.code = dispatch(args, line);
    std::fflush(stdout);
    result.text = testing::internal::GetCapturedStdout();
  } catch (const Error& e) {
    testing::internal::GetCapturedStdout();
    result.text = e.what();
    EXPECT_EQ(exit_code_of(e.kind()), kExitUsage) << e.what();
  }
  return result;
}

TEST(Commands, ErrorsEndWithTheDocumentedExitCodes) {
  using enum ErrorKind;
  for (const ErrorKind kind : {InvalidArgument, BadFile}) EXPECT_EQ(exit_code_of(kind), 2);
  for (const ErrorKind kind : {StoreLost, CommError, DeadlineExceeded, IoError, Stopped}) {
    EXPECT_EQ(exit_code_of(kind), 4) << error_kind_name(kind);
  }
  for (const ErrorKind kind :
       {OutOfMemory, OriginalsLost, Corrupt, NonFinite, DeviceError, Uncertifiable}) {
    EXPECT_EQ(exit_code_of(kind), 1) << error_kind_name(kind);
  }
}

TEST(Commands, NoneGivesAShortHelpThatListsEachOnALine) {
  const Result result = run({});
  EXPECT_EQ(result.code, 0);
  std::set<std::string> names;
  for (const Command& command : commands()) {
    EXPECT_THAT(result.text, HasSubstr(std::string("\n  ") + command.name + " "));
    EXPECT_TRUE(names.insert(command.name).second) << command.name;
  }
  EXPECT_LT(std::count(result.text.begin(), result.text.end(), '\n'), 24);
  EXPECT_EQ(run({"--help"}).text, result.text);
  EXPECT_EQ(run({"help"}).text, result.text);
}

TEST(Commands, EachAnswersHelp) {
  for (const Command& command : commands()) {
    const Result result = run({command.name, "--help"});
    EXPECT_EQ(result.code, 0) << command.name;
    EXPECT_THAT(result.text, testing::StartsWith("usage: "));
    EXPECT_THAT(result.text.substr(0, result.text.find('\n')),
                HasSubstr(std::string("certkv ") + command.name));
    EXPECT_EQ(run({"help", command.name}).text, result.text) << command.name;
  }
}

TEST(Commands, AnUnknownFlagOfEachNamesTheNearest) {
  for (const Command& command : commands()) {
    EXPECT_THAT(run({command.name, "--confg", "x"}).text,
                HasSubstr("unknown flag '--confg'; the nearest known flag is '--config'"))
        << command.name;
  }
}

TEST(Commands, ATypoNamesTheNearestCommand) {
  EXPECT_EQ(run({"doctro"}).text,
            "unknown command 'doctro'; the nearest is 'doctor' (certkv --help lists them)");
  EXPECT_THAT(run({"make_model", "needle"}).text, HasSubstr("the nearest is 'make-model'"));
}

TEST(Commands, VersionIsPrinted) {
  EXPECT_THAT(run({"--version"}).text, testing::MatchesRegex("certkv [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

TEST(StoreCommand, NeedsTheSizeOfItsArena) {
  EXPECT_EQ(run({"store"}).text,
            "command line: certkv store needs --arena SIZE, such as 4GiB or 512MB");
  EXPECT_EQ(run({"store", "--arena", "big"}).text,
            "command line: arena_bytes is 'big'; allowed: a size such as 4GiB or 512MB");
}

// Jobs start the store with these: every flag must be known to the command.
TEST(StoreCommand, KnowsTheFlagsWithWhichJobsStartIt) {
  StoreProcessOptions options;
  options.arena_bytes = 1;
  options.socket = "@x";
  options.ready_fd = 7;
  options.linger = std::chrono::milliseconds(-1);
  std::vector<std::string> line{"store"};
  for (const std::string& word : store_arguments(options)) line.push_back(word);
  line.push_back("--help");
  const std::string help = run(line).text;
  for (const std::string& word : store_arguments(options)) {
    if (word.rfind("--", 0) != 0) continue;
    std::string key = word;
    std::replace(key.begin() + 2, key.end(), '-', '_');
    EXPECT_THAT(help, HasSubstr("  " + key + " ")) << word;
  }
}

TEST(VerifyCommand, NeedsTheFolderOfAnAudit) {
  EXPECT_EQ(run({"verify"}).text,
            "command line: name the folder of the audit: certkv verify FOLDER");
  EXPECT_THAT(run({"verify", "/no/audit"}).text, HasSubstr("/no/audit: no such folder"));
  EXPECT_THAT(run({"verify", CERTKV_READER}).text, HasSubstr("no audit files (*.audit)"));
}

TEST(MakeModelCommand, NamesWhatCanBeMade) {
  EXPECT_EQ(run({"make-model"}).text,
            "command line: name the model to make: certkv make-model needle");
  EXPECT_EQ(run({"make-model", "haystack"}).text,
            "command line: name the model to make: certkv make-model needle ('haystack' is not one "
            "that can be made)");
  EXPECT_THAT(run({"make-model", "needle", "--preset", "weak"}).text,
              HasSubstr("preset is 'weak'; allowed: default, fragile"));
}

TEST(Doctor, PrintsTheMachineAsJson) {
  const Result result = run({"doctor", "--json"});
  EXPECT_EQ(result.code, 0);
  const auto report = nlohmann::json::parse(result.text);
  EXPECT_GT(report.at("machine").at("memory_bytes").get<uint64_t>(), uint64_t(1) << 28);
  EXPECT_GE(report.at("machine").at("cores").get<int>(), 1);
  EXPECT_EQ(report.at("machine").at("attention").get<std::string>(), attend_isa());
  EXPECT_TRUE(report.at("limits").contains("dev_shm_bytes"));
  EXPECT_TRUE(report.at("limits").contains("memlock_bytes"));
  EXPECT_THAT(report.at("libraries").at("mpi").get<std::string>(), HasSubstr("MPI"));
  // Every machine has the loopback device and shared memory.
  EXPECT_TRUE(report.at("libraries").at("ucx_transports").contains("tcp"));
  EXPECT_FALSE(report.contains("verdict"));
}

TEST(Doctor, SaysThatTheDemoModelFits) {
  const Result result = run({"doctor", "--model", CERTKV_READER, "--context", "2048",
                             "--max-num-seqs", "1", "--tensor-parallel-size", "2", "--json"});
  EXPECT_EQ(result.code, 0) << result.text;
  const auto report = nlohmann::json::parse(result.text);
  EXPECT_TRUE(report.at("verdict").at("fits").get<bool>());
  const auto& rank = report.at("each rank needs");
  // By hand: 5 layers, 4 KV heads of 64, 2 ranks: 10 heads a rank; 2048 tokens of 256 B.
  EXPECT_EQ(report.at("each node needs").at("ranks_bytes").get<uint64_t>(),
            2 * rank.at("rank_bytes").get<uint64_t>());
  // Slots of 128 + 2 * 2048 bytes, 20 heads a node. The prompt of 1984 tokens has 31 groups of four
  // blocks; an answer of 64 tokens completes up to two. Each span, three segments of 512 tokens,
  // what is left of the prompt and the answer, may leave most of a granule of 4 KiB a head unused.
  // The arena's own room is 1 MiB.
  EXPECT_EQ(report.at("each node needs").at("tier2_bytes").get<uint64_t>(),
            20u * ((128 + 2 * 2048) * 4 * (31 + 2) + 5 * 4096) + (1 << 20));
  // 2048 / 4 quota is above the 128 blocks there are; keys and values.
  EXPECT_EQ(rank.at("scratch_bytes").get<uint64_t>(), 10u * 2 * 128 * 2048);
}

TEST(Doctor, SaysWhatToChangeWhereItDoesNotFit) {
  const Result result =
      run({"doctor", "--model", CERTKV_READER, "--max-num-seqs", "60000", "--store.arena", "1MB"});
  EXPECT_EQ(result.code, 3);
  EXPECT_THAT(result.text, HasSubstr("does not fit"));
  EXPECT_THAT(result.text, HasSubstr("set run.max_batch to "));
  EXPECT_THAT(result.text, HasSubstr("store.arena is 1MB, and "));
}

TEST(Doctor, RefusesAWrongConfiguration) {
  EXPECT_EQ(run({"doctor", "--model", CERTKV_READER, "--parallel.tensor", "3"}).text,
            "parallel.tensor is 3, which does not divide the model's 4 KV heads; choose one of its "
            "divisors");
  EXPECT_EQ(run({"doctor", "--model", CERTKV_READER, "--context", "131073"}).text,
            "the context is 131073 tokens; this model takes 2 to 131072");
  EXPECT_THAT(run({"doctor", "--model", "/no/model"}).text,
              HasSubstr("model.path is '/no/model': no such file or folder"));
}

TEST(Machine, ReadsWhatCpuinfoSays) {
  const std::string text =
      "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n"
      "flags\t\t: fpu avx avx2 fma avx512f avx512_vnni\n"
      "processor\t: 1\nmodel name\t: other\n";
  EXPECT_EQ(cpuinfo_value(text, "model name"), "Some CPU @ 2 GHz");
  EXPECT_EQ(cpuinfo_value(text, "model"), "");
  EXPECT_THAT(cpu_features(text), testing::ElementsAre("FMA", "AVX2", "AVX-512F", "AVX-512-VNNI"));
  EXPECT_THAT(cpu_features("flags : avx512\n"), testing::IsEmpty());
  EXPECT_THAT(cpu_features(""), testing::IsEmpty());
}

}  // namespace
}  // namespace certkv
