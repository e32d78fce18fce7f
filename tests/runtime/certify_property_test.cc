// Whatever the input: the true error is at most the returned bound, and the returned bound is within
// the tolerance where the outcome says so. CERTKV_CASES sets the cases per shape.
#include <gtest/gtest.h>

#include <cstdlib>

#include "kernels/base/log.h"
#include "tests/support/attention_cases.h"

namespace certkv {
namespace {

#if defined(CERTKV_LONG_PROPERTY)
constexpr uint64_t kDefaultCases = 3000, kFirstSeed = 100000;
#else
constexpr uint64_t kDefaultCases = 60, kFirstSeed = 1;
#endif

uint64_t cases() {
  const char* given = std::getenv("CERTKV_CASES");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : kDefaultCases;
}

class CertifiedCore : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { log_set_level(LogLevel::Error); }
};

TEST_P(CertifiedCore, NeverErrsByMoreThanItsBound) {
  const Shape shape{GetParam()};
  CaseResult all;
  for (uint64_t i = 0; i < cases(); ++i) {
    const CaseResult r = run_case(draw_case(shape, kFirstSeed + i));
    for (const std::string& v : r.violations) ADD_FAILURE() << v;
    all.certified += r.certified;
    all.exact += r.exact;
    all.over += r.over;
    all.failed += r.failed;
    all.broken += r.broken;
    all.head_steps += r.head_steps;
    all.promoted += r.promoted;
    all.learned += r.learned;
    ASSERT_LT(all.broken, 100) << "healthy originals break preconditions";
    if (testing::Test::HasFailure()) break;
  }
  RecordProperty("certified", all.certified);
  RecordProperty("exact", all.exact);
  RecordProperty("over", all.over);
  RecordProperty("failed", all.failed);
  RecordProperty("promoted", all.promoted);
  RecordProperty("learned", int(all.learned));
  // The generator must reach every outcome that it is there to test.
  EXPECT_GT(all.certified, 0);
  EXPECT_GT(all.exact, 0);
  EXPECT_EQ(all.failed, 0) << "the originals are there and finite";
  EXPECT_EQ(all.broken, 0);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CertifiedCore, testing::Range(0, kShapes), [](const auto& shape) {
  return std::string(shape_name(Shape(shape.param)));
});

}  // namespace
}  // namespace certkv
