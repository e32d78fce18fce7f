// What is altered in an audit is found: every bit by the chain, and a forged figure behind a whole
// chain by the arithmetic.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <nlohmann/json.hpp>

#include "kernels/base/log.h"
#include "runtime/audit/log.h"
#include "runtime/audit/reader.h"
#include "runtime/audit/verify.h"
#include "tests/support/audited_case.h"
#include "tests/support/temp_folder.h"

namespace certkv {
namespace {

using audit::LinkKind;
using nlohmann::json;
const bool kQuiet = (log_set_level(LogLevel::Warning), true);
constexpr size_t kHeadDim = 64;

AttentionCase small_case(Policy policy, size_t tokens, int steps) {
  AttentionCase c;
  c.seed = 3;
  c.heads = 2;
  c.tokens = tokens;
  c.steps = steps;
  c.key_quota = c.value_quota = 64;
  c.q_scale = 2;
  c.rules.policy = policy;
  c.rules.tolerance = {true, 1.0};
  return c;
}

audit::VerifyResult verify(const std::string& folder, bool allow_truncated = false) {
  audit::VerifyOptions o;
  o.folder = folder;
  o.allow_truncated = allow_truncated;
  return audit::verify_folder(o);
}

std::vector<std::string> rules_of(const audit::VerifyResult& r) {
  std::vector<std::string> rules;
  for (const audit::Violation& v : r.listed) rules.push_back(v.rule);
  return rules;
}

struct Forgery {
  const char* name;
  const char* rule;  // that must find it
  std::function<void(std::vector<AuditLink>&)> alter;
};

std::function<void(std::vector<AuditLink>&)> in_json(LinkKind kind,
                                                     std::function<void(json&)> alter) {
  return [=](std::vector<AuditLink>& links) {
    for (AuditLink& link : links) {
      if (link.kind != kind) continue;
      json v = json::parse(link.payload);
      alter(v);
      link.payload = v.dump();
      return;
    }
    ADD_FAILURE() << "no such link";
  };
}

// Head 1 of the second record.
std::function<void(std::vector<AuditLink>&)> in_head(
    std::function<void(audit::Record&, audit::HeadRecord&)> alter) {
  return [=](std::vector<AuditLink>& links) {
    int seen = 0;
    for (AuditLink& link : links) {
      if (link.kind != LinkKind::Record || ++seen < 2) continue;
      audit::Record r;
      ASSERT_EQ(audit::decode(link.payload, kHeadDim, &r), "");
      alter(r, r.heads[1]);
      link.payload = audit::encode(r);
      return;
    }
    ADD_FAILURE() << "no such record";
  };
}

// Lowers the bound so that its parts still make it.
void lower_bound(audit::HeadRecord& h, double factor) {
  audit::HeadFigures& f = h.figures;
  f.bound *= factor;
  f.e_key *= factor;
  f.e_val *= factor;
  f.e_acc *= factor;
  f.e_fp = f.bound - f.e_key - f.e_val;
  f.relative = f.bound / f.s;
}

void drop_last(std::vector<AuditLink>& links, LinkKind kind) {  // drops the last link of the kind
  for (size_t i = links.size(); i-- > 0;)
    if (links[i].kind == kind) {
      links.erase(links.begin() + long(i));
      return;
    }
}

const std::vector<Forgery>& forgeries() {
  static const std::vector<Forgery> list = {
      {"BoundThreePercentTooSmall", "E4",
       in_head([](auto&, auto& h) { lower_bound(h, 0.97); })},
      {"BoundBelowTheError", "error", in_head([](auto&, auto& h) { lower_bound(h, 1e-3); })},
      {"BoundAgainstItsParts", "parts",
       in_head([](auto&, auto& h) {
         h.figures.bound *= 1.001;
         h.figures.relative = h.figures.bound / h.figures.s;
       })},
      {"RelativeBound", "relative", in_head([](auto&, auto& h) { h.figures.relative *= 0.5; })},
      {"NanBound", "bound",
       in_head([](auto&, auto& h) { h.figures.bound = std::nan(""); })},
      {"Delta", "delta", in_head([](auto&, auto& h) { h.delta[2] *= 0.5f; })},
      {"DeltaOfNaN", "delta", in_head([](auto&, auto& h) { h.delta[2] = std::nanf(""); })},
      {"DeltaOfTheOpenBlock", "delta", in_head([](auto&, auto& h) { h.delta.back() *= 0.5f; })},
      {"ScoreError", "score error", in_head([](auto&, auto& h) { h.delta[2] *= 0.01f; })},
      {"Eta", "eta", in_head([](auto&, auto& h) { h.eta[1] *= 0.5f; })},
      {"EtaOfAnotherBlock", "eta", in_head([](auto&, auto& h) { h.eta[1] = 0; })},
      {"Nu", "nu", in_head([](auto& r, auto&) { r.nu[3] *= 0.5f; })},
      {"MassMoved", "mass",
       in_head([](auto&, auto& h) {
         h.mass[0] += 0.5 * h.mass[4];
         h.mass[4] *= 0.5;
       })},
      {"MassLost", "mass", in_head([](auto&, auto& h) { h.mass[0] = 0; })},
      {"KeysNotUsed", "naive", in_head([](auto&, auto& h) { h.used[0] |= 1; })},
      {"ValuesNotUsed", "naive", in_head([](auto&, auto& h) { h.used[0] |= 2; })},
      {"CodesOfTheOpenBlock", "sources", in_head([](auto&, auto& h) { h.used.back() = 0; })},
      {"Output", "error", in_head([](auto&, auto& h) { h.out[5] += 3; })},
      {"OutputOfNaN", "error", in_head([](auto&, auto& h) { h.out[5] = std::nanf(""); })},
      {"QueryOfNaN", "delta", in_head([](auto&, auto& h) { h.q[5] = std::nanf(""); })},
      {"MassOfNaN", "mass", in_head([](auto&, auto& h) { h.mass[1] = std::nan(""); })},
      {"OutputNorm", "norm", in_head([](auto&, auto& h) { h.figures.out_norm *= 0.9; })},
      {"Query", "mass",
       in_head([](auto&, auto& h) {
         for (float& x : h.q) x = -x;
       })},
      {"OutcomeExact", "exact", in_head([](auto&, auto& h) { h.head.outcome = 1; })},
      {"OutcomeFailed", "failed", in_head([](auto&, auto& h) { h.head.outcome = 2; })},
      {"OutcomeOver", "over", in_head([](auto&, auto& h) { h.head.outcome = 3; })},
      {"OutcomeUnknown", "outcome", in_head([](auto&, auto& h) { h.head.outcome = 9; })},
      {"RungTwo", "rung", in_head([](auto&, auto& h) { h.head.rung = 2; })},
      {"RungThree", "certified", in_head([](auto&, auto& h) { h.head.rung = 3; })},
      {"RungInTheCounts", "counts",
       in_head([](auto&, auto& h) {
         h.head.rung = 1;
         h.head.promoted_keys = 1;
       })},
      {"Promotions", "rung", in_head([](auto&, auto& h) { h.head.promoted_values = 1; })},
      {"LargerS", "S", in_head([](auto&, auto& h) { h.figures.s_lo *= 1.01; })},
      {"SmallerS", "S",
       in_head([](auto&, auto& h) {
         h.figures.s *= 0.99;
         h.figures.s_lo *= 0.99;
         h.figures.relative = h.figures.bound / h.figures.s;
       })},
      {"Den", "E2", in_head([](auto&, auto& h) { h.figures.den *= 1.01; })},
      {"KeyTerm", "E2",
       in_head([](auto&, auto& h) {
         h.figures.e_fp += 0.1 * h.figures.e_key;
         h.figures.e_key *= 0.9;
       })},
      {"ValueTerm", "E1",
       in_head([](auto&, auto& h) {
         h.figures.e_fp += 0.1 * h.figures.e_val;
         h.figures.e_val *= 0.9;
       })},
      {"RoundingTerm", "E3", in_head([](auto&, auto& h) { h.figures.e_acc *= 0.5; })},
      {"QueryHead", "record", in_head([](auto& r, auto&) { r.head.first_query_head = 1; })},
      {"FewerBlocks", "record",
       in_head([](auto& r, auto&) {
         --r.head.blocks;
         r.nu.pop_back();
         for (audit::HeadRecord& h : r.heads) {
           h.mass.pop_back();
           h.delta.pop_back();
           h.eta.pop_back();
           h.used.pop_back();
         }
       })},
      {"Tolerance", "certified",
       in_json(LinkKind::Sequence, [](json& v) { v["tolerance"] = {{"relative", 1e-5}}; })},
      {"Policy", "policy", in_json(LinkKind::Sequence, [](json& v) { v["policy"] = "lax"; })},
      {"PolicyThatEnforces", "certified",
       in_json(LinkKind::Sequence, [](json& v) { v["policy"] = "dense"; })},
      {"CountOfRecords", "counts", in_json(LinkKind::Close, [](json& v) { v["records"] = 4; })},
      {"CountOfOutcomes", "counts",
       in_json(LinkKind::Close, [](json& v) { v["outcomes"]["certified"] = 5; })},
      {"ALaterEnd", "chain",  // than max_tokens allow
       in_json(LinkKind::Close, [](json& v) { v["tokens"] = v["tokens"].get<int>() + 1; })},
      {"AnEarlierEnd", "choice",
       in_json(LinkKind::Close, [](json& v) { v["tokens"] = v["tokens"].get<int>() - 1; })},
      {"Sample", "choice", in_json(LinkKind::Header, [](json& v) { v["sample"] = 0.4; })},
      {"World", "files", in_json(LinkKind::Header, [](json& v) { v["world"] = 2; })},
      {"Rank", "files",
       in_json(LinkKind::Header,
               [](json& v) {
                 v["world"] = 2;
                 v["rank"] = 1;
               })},
      {"KvHeads", "files", in_json(LinkKind::Header,
                                   [](json& v) {
                                     v["model"]["kv_heads"] = 2;
                                     v["model"]["query_heads"] = 4;
                                   })},
      {"Layout", "delta",
       in_json(LinkKind::Header, [](json& v) { v["layout"]["key"]["code_bits"] = 6; })},
      {"StatedRounding", "chain",
       in_json(LinkKind::Header, [](json& v) { v["rounding"]["eps_w"] = 0.0; })},
      {"AnotherFormat", "chain", in_json(LinkKind::Header, [](json& v) { v["format"] = 2; })},
      {"RecordDropped", "chain", [](auto& links) { drop_last(links, LinkKind::Record); }},
      {"RowsDropped", "chain",
       [](auto& links) {
         links.erase(links.begin() + 2);
       }},
      {"TheKeyOfAToken", "mass",
       [](auto& links) {
         for (AuditLink& link : links) {
           if (link.kind != LinkKind::Rows) continue;
           for (size_t c = 0; c < kHeadDim; ++c) link.payload[24 + 2 * c + 1] ^= char(0x80);
           return;
         }
       }},
      {"TheValuesOfTheNewestToken", "error",
       [](auto& links) {
         int seen = 0;
         for (AuditLink& link : links) {
           if (link.kind != LinkKind::Rows || ++seen < 3) continue;  // of the second step
           for (size_t c = 0; c < kHeadDim; ++c)
             link.payload[24 + 2 * kHeadDim + 2 * c + 1] ^= char(0x04);
           return;
         }
       }},
  };
  return list;
}

class AuditForgery : public ::testing::TestWithParam<size_t> {};

TEST_P(AuditForgery, IsFoundBehindAWholeChain) {
  const Forgery& f = forgeries()[GetParam()];
  const test::TempFolder folder;
  run_audited(small_case(Policy::Naive, 150, 3), folder.path().string());
  const std::string path = folder / audit::file_name(0, 0);
  ASSERT_EQ(verify(folder.path().string()).violations, 0u);
  std::vector<AuditLink> links = read_links(path);
  write_links(path, links);  // the chain of the test is the writer's
  ASSERT_EQ(verify(folder.path().string()).violations, 0u);
  f.alter(links);
  write_links(path, links);
  EXPECT_THAT(rules_of(verify(folder.path().string())), testing::Contains(std::string(f.rule)));
}

INSTANTIATE_TEST_SUITE_P(All, AuditForgery, ::testing::Range(size_t(0), forgeries().size()),
                         [](const auto& i) { return forgeries()[i.param].name; });

TEST(AuditForgeryOfDense, AnExactHeadThatUsedCodesOrClaimsLessRoundingIsFound) {
  const test::TempFolder folder;
  run_audited(small_case(Policy::Dense, 150, 2), folder.path().string());
  const std::string path = folder / audit::file_name(0, 0);
  const std::vector<AuditLink> honest = read_links(path);
  ASSERT_EQ(verify(folder.path().string()).violations, 0u);
  std::vector<AuditLink> links = honest;
  in_head([](auto&, auto& h) { h.used[1] = 1; })(links);
  write_links(path, links);
  EXPECT_THAT(rules_of(verify(folder.path().string())), testing::Contains("exact"));
  links = honest;
  in_head([](auto&, auto& h) { lower_bound(h, 0.8); })(links);
  write_links(path, links);
  EXPECT_THAT(rules_of(verify(folder.path().string())), testing::Contains("E4"));
}

std::string broken(const std::string& path) {
  return audit::read_index(path, [](uint64_t) {}).broken;
}

TEST(AuditChain, EverySingleBitCounts) {
  const test::TempFolder folder;
  run_audited(small_case(Policy::Budget, 20, 1), folder.path().string());
  const std::string path = folder / audit::file_name(0, 0);
  const std::string bytes = test::TempFolder::read(path);
  ASSERT_GT(bytes.size(), 8000u);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  size_t missed = 0;
  for (size_t i = 0; i < bytes.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      const char altered = char(bytes[i] ^ (1 << bit));
      ASSERT_EQ(::pwrite(fd, &altered, 1, off_t(i)), 1);
      missed += broken(path).empty();
      ASSERT_EQ(::pwrite(fd, &bytes[i], 1, off_t(i)), 1);
    }
  ::close(fd);
  EXPECT_EQ(missed, 0u);
  EXPECT_EQ(broken(path), "");
}

TEST(AuditChain, AFileThatWasCutAnywhereIsTruncatedByName) {
  const test::TempFolder folder;
  run_audited(small_case(Policy::Budget, 20, 1), folder.path().string());
  const std::string path = folder / audit::file_name(0, 0);
  const std::string bytes = test::TempFolder::read(path);
  for (size_t n = bytes.size(); n-- > 0;) {
    ASSERT_EQ(::truncate(path.c_str(), off_t(n)), 0);
    const audit::FileIndex index = audit::read_index(path, [](uint64_t) {});
    ASSERT_TRUE(index.truncated) << n << index.broken;
    ASSERT_THAT(index.broken, testing::HasSubstr("truncated")) << n;
  }
}

TEST(AuditChain, ATruncatedFileIsAViolationUnlessItIsAllowed) {
  const test::TempFolder folder;
  run_audited(small_case(Policy::Naive, 150, 3), folder.path().string());
  const std::string path = folder / audit::file_name(0, 0);
  std::vector<AuditLink> links = read_links(path);
  links.resize(links.size() - 2);  // without close and end: as a killed job leaves it
  write_links(path, links);
  EXPECT_THAT(rules_of(verify(folder.path().string())), testing::Contains("truncated"));
  const audit::VerifyResult allowed = verify(folder.path().string(), true);
  EXPECT_EQ(allowed.head_steps, 6u);
  EXPECT_THAT(rules_of(allowed), testing::IsEmpty());
  // What is there must be complete: of three records the second may not be missing.
  size_t second = 0;
  for (int seen = 0; seen < 2; ++second) seen += links[second].kind == LinkKind::Record;
  links.erase(links.begin() + long(second) - 1);
  write_links(path, links);
  EXPECT_THAT(rules_of(verify(folder.path().string(), true)), testing::ElementsAre("choice"));
}

TEST(AuditChain, AFailedSequenceMayLackItsLastStepAndNoMore) {
  const test::TempFolder folder;
  run_audited(small_case(Policy::Naive, 150, 3), folder.path().string());
  const std::string path = folder / audit::file_name(0, 0);
  const std::vector<AuditLink> honest = read_links(path);
  for (const int lacking : {1, 2}) {
    std::vector<AuditLink> links = honest;
    for (int i = 0; i < lacking; ++i) drop_last(links, LinkKind::Record);
    in_json(LinkKind::Close, [&](json& v) {
      v["failed"] = true;
      v["records"] = 3 - lacking;
      v["head_steps"] = v["outcomes"]["certified"] = v["rungs"]["0"] = 2 * (3 - lacking);
    })(links);
    in_json(LinkKind::End, [&](json& v) {
      v["records"] = 3 - lacking;
      v["links"] = v["links"].get<int>() - lacking;
    })(links);
    write_links(path, links);
    const audit::VerifyResult r = verify(folder.path().string());
    if (lacking == 1) {
      EXPECT_THAT(rules_of(r), testing::IsEmpty());
    } else {
      EXPECT_THAT(rules_of(r), testing::ElementsAre("choice"));
    }
  }
}

TEST(AuditChain, AFullDiskEndsByNameAndLeavesWholeLinks) {
  const test::TempFolder folder;
  ::signal(SIGXFSZ, SIG_IGN);
  struct rlimit old {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const struct rlimit small { 12000, old.rlim_max };
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string what;
  try {
    run_audited(small_case(Policy::Naive, 30, 9), folder.path().string());
  } catch (const Error& e) {
    what = e.what();
    EXPECT_EQ(e.kind(), ErrorKind::IoError);
  }
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  EXPECT_THAT(what, testing::HasSubstr("make room on that disk"));
  EXPECT_THAT(what, testing::HasSubstr(audit::file_name(0, 0)));
  const audit::FileIndex index =
      audit::read_index(folder / audit::file_name(0, 0), [](uint64_t) {});
  EXPECT_TRUE(index.truncated);
  EXPECT_THAT(index.broken, testing::HasSubstr("the last link is not an end"));
  EXPECT_GT(index.records, 0u);
}

TEST(AuditFolder, OneWithoutAuditFilesIsRefused) {
  const test::TempFolder folder;
  EXPECT_THROW(verify(folder.path().string()), Error);
  EXPECT_THROW(verify(folder / "none"), Error);
}

TEST(AuditFolder, AnExistingFileIsNotWrittenOver) {
  const test::TempFolder folder;
  const AttentionCase c = small_case(Policy::Naive, 30, 1);
  run_audited(c, folder.path().string());
  EXPECT_THROW(run_audited(c, folder.path().string()), Error);
  EXPECT_EQ(audit::next_session(folder.path().string()), 1);
  EXPECT_EQ(verify(folder.path().string()).violations, 0u);
}

}  // namespace
}  // namespace certkv
