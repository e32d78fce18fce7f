#include "kernels/base/failpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <set>
#include <vector>

#include "kernels/base/error.h"

namespace certkv {
namespace {

using ::testing::HasSubstr;

class Failpoint : public ::testing::Test {
 protected:
  Failpoint() { failpoint::clear(); }
  ~Failpoint() override { failpoint::clear(); }
};

void pass() {
  CERTKV_FAILPOINT(engine_step);
}
bool forced() {
  return CERTKV_FAILPOINT_FORCED(holder_full);
}

// At which of `hits` hits the point throws.
std::vector<int> thrown_at(int hits) {
  std::vector<int> at;
  for (int i = 0; i < hits; ++i) {
    try {
      pass();
    } catch (const Error&) {
      at.push_back(i);
    }
  }
  return at;
}

std::string refusal(const char* text) {
  try {
    failpoint::set(text);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::InvalidArgument);
    return e.what();
  }
  ADD_FAILURE() << text << " was accepted";
  return {};
}

TEST_F(Failpoint, DoesNothingUntilItIsSetAndAfterItIsCleared) {
  EXPECT_THAT(thrown_at(3), ::testing::IsEmpty());
  failpoint::set("engine.step=error:Corrupt");
  EXPECT_EQ(thrown_at(2).size(), 2u);
  failpoint::clear();
  EXPECT_THAT(thrown_at(3), ::testing::IsEmpty());
  EXPECT_FALSE(forced());
}

TEST_F(Failpoint, ThrowsTheKindThatWasAskedForWithItsName) {
  for (const auto kind : {ErrorKind::StoreLost, ErrorKind::OutOfMemory, ErrorKind::Stopped}) {
    failpoint::set(std::string("engine.step=error:") + error_kind_name(kind));
    try {
      pass();
      ADD_FAILURE() << "nothing was thrown";
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), kind);
      EXPECT_THAT(e.what(), HasSubstr("engine.step"));
    }
  }
}

TEST_F(Failpoint, SkipsCountsAndSaysHowOften) {
  failpoint::set("engine.step=error:IoError,skip=2,count=3");
  EXPECT_EQ(thrown_at(9), (std::vector<int>{2, 3, 4}));
  EXPECT_EQ(failpoint::fired("engine.step"), 3u);
}

TEST_F(Failpoint, DrawsBySeedAndByNothingElse) {
  const auto draw = [](const char* text) {
    failpoint::set(text);
    return thrown_at(1000);
  };
  const auto one = draw("engine.step=error:IoError,probability=0.25,seed=1");
  EXPECT_GT(one.size(), 195u);  // 250 with a deviation of 13.7: four of them
  EXPECT_LT(one.size(), 305u);
  EXPECT_EQ(draw("engine.step=error:IoError,probability=0.25,seed=1"), one);
  EXPECT_NE(draw("engine.step=error:IoError,probability=0.25,seed=2"), one);
  EXPECT_THAT(draw("engine.step=error:IoError,probability=0"), ::testing::IsEmpty());
}

TEST_F(Failpoint, FlipsOneBitInsideTheBytesGiven) {
  std::set<size_t> places;
  failpoint::set("reader.source=corrupt,seed=3");
  for (int i = 0; i < 300; ++i) {
    std::vector<uint8_t> bytes(18, 0);
    CERTKV_FAILPOINT_BYTES(reader_source, bytes.data() + 1, 16);
    int bits = 0;
    for (uint8_t b : bytes) bits += std::popcount(b);
    ASSERT_EQ(bits, 1);
    const auto at = std::find_if(bytes.begin(), bytes.end(), [](uint8_t b) { return b != 0; });
    const size_t place = size_t(at - bytes.begin());
    ASSERT_TRUE(place >= 1 && place <= 16) << place;
    places.insert(place);
  }
  EXPECT_EQ(places.size(), 16u);
}

TEST_F(Failpoint, WritesANaN) {
  failpoint::set("cache.query=nan");
  std::vector<float> q(8, 1.0f);
  CERTKV_FAILPOINT_BYTES(cache_query, q.data(), q.size() * 4);
  EXPECT_EQ(std::count_if(q.begin(), q.end(), [](float x) { return x != x; }), 1);
}

TEST_F(Failpoint, SleepsAndGoesOn) {
  failpoint::set("engine.step=sleep:30");
  const auto start = std::chrono::steady_clock::now();
  pass();
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(30));
}

TEST_F(Failpoint, ForcesOnlyWhereAsked) {
  failpoint::set("holder.full=force,count=1");
  EXPECT_TRUE(forced());
  EXPECT_FALSE(forced());
}

TEST_F(Failpoint, DiesByPanicAndWritesItDownFirst) {
  const std::string log = testing::TempDir() + "certkv-failpoint-log";
  ::setenv("CERTKV_FAILPOINT_LOG", log.c_str(), 1);
  EXPECT_EXIT(
      {
        failpoint::set("engine.step=panic");
        pass();
      },
      ::testing::KilledBySignal(SIGKILL), "");
  ::unsetenv("CERTKV_FAILPOINT_LOG");
  char line[64] = {};
  std::FILE* file = std::fopen(log.c_str(), "r");
  ASSERT_NE(file, nullptr);
  EXPECT_NE(std::fgets(line, sizeof line, file), nullptr);
  std::fclose(file);
  std::remove(log.c_str());
  EXPECT_THAT(line, HasSubstr("engine.step "));
}

TEST_F(Failpoint, RefusesWhatItDoesNotKnow) {
  EXPECT_THAT(refusal("engine.stop=panic"), HasSubstr("engine.stop"));
  EXPECT_THAT(refusal("engine.step"), HasSubstr("NAME=ACTION"));
  EXPECT_THAT(refusal("engine.step=corrupt"), HasSubstr("panic error sleep"));
  EXPECT_THAT(refusal("holder.full=error:IoError"), HasSubstr("force"));
  EXPECT_THAT(refusal("engine.step=error:Nonsense"), HasSubstr("Nonsense"));
  EXPECT_THAT(refusal("engine.step=sleep:soon"), HasSubstr("soon"));
  EXPECT_THAT(refusal("engine.step=panic,often=3"), HasSubstr("often"));
  EXPECT_THAT(refusal("engine.step=panic,probability=1.5"), HasSubstr("1.5"));
  EXPECT_THAT(thrown_at(2), ::testing::IsEmpty());
}

TEST_F(Failpoint, AnotherRanksIsNotOurs) {
  ::setenv("OMPI_COMM_WORLD_RANK", "1", 1);
  failpoint::set("engine.step=error:IoError,rank=0");
  EXPECT_THAT(thrown_at(2), ::testing::IsEmpty());
  failpoint::set("engine.step=error:IoError,rank=1");
  EXPECT_EQ(thrown_at(2).size(), 2u);
  ::unsetenv("OMPI_COMM_WORLD_RANK");
}

TEST_F(Failpoint, NamesAreDistinctAndSayWhatMustHold) {
  std::set<std::string> names;
  for (const failpoint::Row& row : failpoint::table()) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
    EXPECT_NE(row.name.find('.'), std::string::npos) << row.name;
    EXPECT_GT(std::string(row.holds).size(), 5u) << row.name;
  }
  EXPECT_GE(names.size(), 40u);
}

}  // namespace
}  // namespace certkv
