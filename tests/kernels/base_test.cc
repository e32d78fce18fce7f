#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/base/error.h"
#include "kernels/base/thread_pool.h"

namespace certkv {
namespace {

TEST(Half, EveryPatternSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t h = uint16_t(bits);
    const bool f16_nan = (h & 0x7fff) > 0x7c00, bf16_nan = (h & 0x7fff) > 0x7f80;
    if (f16_nan) {
      EXPECT_TRUE(std::isnan(f16_to_float(h)));
    } else {
      EXPECT_EQ(float_to_f16(f16_to_float(h)), h);
    }
    if (bf16_nan) {
      EXPECT_TRUE(std::isnan(bf16_to_float(h)));
    } else {
      EXPECT_EQ(float_to_bf16(bf16_to_float(h)), h);
    }
  }
}

TEST(Half, AgreesWithTheCompilersOwnConversion) {
  // Oracle: _Float16 of the compiler (software or F16C), on values around every rounding boundary.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float lo = f16_to_float(uint16_t(bits)), hi = f16_to_float(uint16_t(bits + 1));
    EXPECT_EQ(lo, float(std::bit_cast<_Float16>(uint16_t(bits))));
    if (!std::isfinite(hi)) continue;
    const float mid = lo + (hi - lo) / 2;
    for (float f : {std::nextafter(mid, 0.f), mid, std::nextafter(mid, hi), lo, hi}) {
      EXPECT_EQ(float_to_f16(f), std::bit_cast<uint16_t>(_Float16(f))) << f;
      EXPECT_EQ(float_to_f16(-f), std::bit_cast<uint16_t>(_Float16(-f))) << f;
    }
  }
  for (float f : {65519.f, 65520.f, 1e9f, std::numeric_limits<float>::infinity(), 1e-30f})
    EXPECT_EQ(float_to_f16(f), std::bit_cast<uint16_t>(_Float16(f))) << f;
}

TEST(Bf16, RoundsHalfToEven) {
  EXPECT_EQ(float_to_bf16(std::bit_cast<float>(0x3f808000u)), 0x3f80);
  EXPECT_EQ(float_to_bf16(std::bit_cast<float>(0x3f818000u)), 0x3f82);
  EXPECT_EQ(float_to_bf16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(ThreadPool, RunsEveryTaskOnceForAnyNumberOfThreads) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 50; ++round) {
      std::vector<std::atomic<int>> hits(137);
      pool.parallel_for(hits.size(), [&](size_t i) { ++hits[i]; });
      for (auto& h : hits) ASSERT_EQ(h, 1);
    }
  }
}

// Workers look for the next call for a while and then sleep: calls come in both states, and so fast
// that a worker may miss one altogether.
TEST(ThreadPool, RunsEveryTaskOfShortCallsInARowAndAfterPauses) {
  ThreadPool pool(4);
  for (int call = 0; call < 20000; ++call) {
    std::array<int, 3> hits{};  // not atomic: each task has a place of its own
    pool.parallel_for(hits.size(), [&](size_t i) { ++hits[i]; });
    for (int h : hits) ASSERT_EQ(h, 1) << "call " << call;
    if (call % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST(ThreadPool, RethrowsTheErrorOfATask) {
  ThreadPool pool(3);
  EXPECT_THROW(
      pool.parallel_for(20, [](size_t i) { CERTKV_EXPECT(i != 7, Corrupt, "task {}", i); }), Error);
  std::atomic<int> ran{0};
  pool.parallel_for(4, [&](size_t) { ++ran; });  // still usable
  EXPECT_EQ(ran, 4);
}

TEST(Expect, NanFailsTheConditionAndTheMessageNamesTheValue) {
  const double x = std::nan("");
  try {
    CERTKV_EXPECT(x <= 1.0, InvalidArgument, "x is {}", x);
    FAIL() << "NaN passed";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::InvalidArgument);
    EXPECT_STREQ(e.what(), "x is nan");
    EXPECT_NE(e.where().find("base_test.cc:"), std::string::npos);
  }
}

}  // namespace
}  // namespace certkv
