#include "tests/parallel/communicator_contract.h"

#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>
#include <thread>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr std::chrono::milliseconds kSilence{5000};
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr uint64_t kStep = (uint64_t(7) << 32) + 41;

TensorView view(std::vector<float>& x) { return view_f32(x.data(), x.size()); }
TensorView view16(DType type, std::vector<uint16_t>& x) {
  return {x.data(), x.size(), type, MemoryKind::Host};
}

float sum_of(Communicator& c, float mine) {
  std::vector<float> x{mine};
  c.all_reduce_sum(view(x), {});
  c.wait(kSilence);
  return x[0];
}

// ---- sums ---------------------------------------------------------------------------------------

void sums_add_every_rank_once(Communicator& c) {
  // Integers below 2^24 add exactly in FP32, in any order.
  for (size_t n : {size_t(0), size_t(1), size_t(3), size_t(2049), size_t(70000), size_t(1000003)}) {
    std::vector<float> x(n);
    for (size_t i = 0; i < n; ++i) x[i] = float(i % 1000) + 1000.0f * float(c.rank());
    c.all_reduce_sum(view(x), {});
    c.wait(kSilence);
    const int p = c.size();
    size_t wrong = 0;
    for (size_t i = 0; i < n; ++i) {
      wrong += x[i] != float(p) * float(i % 1000) + 1000.0f * float(p * (p - 1) / 2);
    }
    EXPECT_EQ(wrong, 0u) << n << " elements on rank " << c.rank();
  }
}

void sums_have_the_same_bits_on_every_rank(Communicator& c) {
  std::mt19937 random(17u + unsigned(c.rank()));
  std::normal_distribution<float> normal(0, 1e3f);
  std::vector<float> x(10007), all(x.size() * size_t(c.size()));
  for (float& v : x) v = normal(random);
  c.all_reduce_sum(view(x), {});
  c.wait(kSilence);
  c.all_gather(view(x), view(all), {});
  c.wait(kSilence);
  size_t different = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    different += std::bit_cast<uint32_t>(all[i]) != std::bit_cast<uint32_t>(x[i % x.size()]);
  }
  EXPECT_EQ(different, 0u);
}

void sums_keep_infinities_and_nan(Communicator& c) {
  for (int r = 0; r < c.size(); ++r) {
    const bool me = c.rank() == r;
    EXPECT_EQ(sum_of(c, me ? kInf : 1.0f), kInf);
    EXPECT_EQ(sum_of(c, me ? -kInf : 1.0f), -kInf);
    EXPECT_TRUE(std::isnan(sum_of(c, me ? kNan : 1.0f))) << "NaN from rank " << r << " was lost";
    if (c.size() > 1) {
      EXPECT_TRUE(std::isnan(sum_of(c, me ? kInf : -kInf)));
    }
    EXPECT_EQ(sum_of(c, me ? std::numeric_limits<float>::denorm_min() : 0.0f),
              std::numeric_limits<float>::denorm_min());
  }
  EXPECT_TRUE(std::signbit(sum_of(c, -0.0f)));
}

// 2048 + 1 is 2048 in half precision (ulp 2): only sums kept in FP32 see the ones. In bfloat16 the
// same happens at 256.
void sums_of_16_bits_are_made_in_fp32_and_rounded_once(Communicator& c) {
  for (const DType type : {DType::F16, DType::BF16}) {
    const float big = type == DType::F16 ? 2048.0f : 256.0f;
    std::vector<uint16_t> x{float_to_16(type, c.rank() == 0 ? big : 1.0f),
                            float_to_16(type, c.rank() == 0 ? kNan : 1.0f),
                            float_to_16(type, c.rank() == 0 ? kInf : 1.0f)};
    c.all_reduce_sum(view16(type, x), {});
    c.wait(kSilence);
    EXPECT_EQ(x[0], float_to_16(type, big + float(c.size() - 1))) << dtype_name(type);
    EXPECT_TRUE(std::isnan(float_from_16(type, x[1])));
    EXPECT_EQ(float_from_16(type, x[2]), kInf);
  }
  // Rank order: with three or more ranks 2^24, 1, -2^24 sum to 0 from left to right, and to 1 if
  // the outer two met first.
  if (c.size() >= 3) {
    const float parts[] = {16777216.0f, 1.0f, -16777216.0f};
    std::vector<uint16_t> x{float_to_bf16(c.rank() < 3 ? parts[c.rank()] : 0.0f)};
    c.all_reduce_sum(view16(DType::BF16, x), {});
    c.wait(kSilence);
    EXPECT_EQ(bf16_to_float(x[0]), 0.0f);
  }
}

void sums_of_u64_wrap(Communicator& c) {
  std::vector<uint64_t> x{~uint64_t(0), uint64_t(1) << 40};
  c.all_reduce_sum(view_u64(x.data(), x.size()), {});
  c.wait(kSilence);
  EXPECT_EQ(x[0], uint64_t(0) - uint64_t(c.size()));
  EXPECT_EQ(x[1], uint64_t(c.size()) << 40);
}

// ---- gather, broadcast, barrier -----------------------------------------------------------------

void gathers_are_in_rank_order(Communicator& c) {
  for (size_t n : {size_t(1), size_t(5), size_t(30011)}) {
    std::vector<float> all(n * size_t(c.size()), -1), apart(n);
    for (size_t i = 0; i < n; ++i) apart[i] = float(c.rank()) * 1e5f + float(i % 99991);
    for (const bool in_place : {false, true}) {
      std::fill(all.begin(), all.end(), -1.0f);
      float* own = all.data() + size_t(c.rank()) * n;
      if (in_place) std::copy(apart.begin(), apart.end(), own);
      c.all_gather(in_place ? view_f32(own, n) : view(apart), view(all), {});
      c.wait(kSilence);
      size_t wrong = 0;
      for (size_t i = 0; i < all.size(); ++i) {
        wrong += all[i] != float(i / n) * 1e5f + float(i % n % 99991);
      }
      EXPECT_EQ(wrong, 0u) << n << (in_place ? " in place" : " apart");
    }
  }
}

void gathers_carry_any_type(Communicator& c) {
  std::vector<char> mine(3, char('a' + c.rank())), all(3 * size_t(c.size()));
  c.all_gather({mine.data(), 3, DType::U8, MemoryKind::Host},
               {all.data(), all.size(), DType::U8, MemoryKind::Host}, {});
  c.wait(kSilence);
  for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], char('a' + i / 3));
}

void broadcasts_come_from_the_root(Communicator& c) {
  for (int root = 0; root < c.size(); ++root) {
    std::vector<uint64_t> x(1000, uint64_t(c.rank()));
    c.broadcast(view_u64(x.data(), x.size()), root, {});
    c.wait(kSilence);
    EXPECT_EQ(x, std::vector<uint64_t>(1000, uint64_t(root)));
  }
}

void barriers_wait_for_the_last(Communicator& c) {
  c.barrier({});
  c.wait(kSilence);
  const auto start = std::chrono::steady_clock::now();
  constexpr std::chrono::milliseconds kLate{60};
  if (c.rank() == c.size() - 1) std::this_thread::sleep_for(kLate);
  c.barrier({});
  c.wait(kSilence);
  // Half of it is enough to tell that somebody waited, and leaves room for the first barrier's skew.
  EXPECT_GE(std::chrono::steady_clock::now() - start, kLate / 2);
}

void several_operations_may_be_under_way(Communicator& c) {
  for (int round = 0; round < 20; ++round) {
    std::vector<float> a(100, 1), b(50, float(c.rank())), d(50 * size_t(c.size()));
    std::vector<uint64_t> e{c.rank() == 0 ? 9u : 0u};
    VerdictRecord v;
    v.sum.votes = 1;
    set_step(v, kStep);
    c.all_reduce_sum(view(a), {});
    c.all_gather(view(b), view(d), {});
    c.broadcast(view_u64(e.data(), 1), 0, {});
    c.reduce_verdict({&v, 1}, {});
    c.barrier({});
    c.wait(kSilence);
    EXPECT_EQ(a[99], float(c.size()));
    EXPECT_EQ(d.back(), float(c.size() - 1));
    EXPECT_EQ(e[0], 9u);
    EXPECT_TRUE(verdict_agreed(v, uint64_t(c.size()), kStep));
  }
  c.wait(kSilence);  // nothing under way
}

// ---- arguments ----------------------------------------------------------------------------------

template <typename F>
void expect_invalid(F&& f, const char* what) {
  try {
    f();
    ADD_FAILURE() << what << " was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::InvalidArgument) << what << ": " << error.what();
  }
}

void views_that_do_not_fit_are_refused_and_the_group_stays_whole(Communicator& c) {
  std::vector<float> x(4), y(4 * size_t(c.size()) + 1);
  expect_invalid([&] { c.all_reduce_sum({x.data(), 4, DType::F32, MemoryKind::Device}, {}); },
                 "device memory");
  expect_invalid([&] { c.all_reduce_sum({nullptr, 4, DType::F32, MemoryKind::Host}, {}); }, "null");
  expect_invalid([&] { c.all_reduce_sum({x.data(), 4, DType::I32, MemoryKind::Host}, {}); },
                 "a sum of I32");
  expect_invalid([&] { c.all_reduce_sum({x.data(), SIZE_MAX, DType::F32, MemoryKind::Host}, {}); },
                 "more than memory");
  expect_invalid([&] { c.all_gather(view(x), view(y), {}); }, "a gather of the wrong size");
  expect_invalid([&] { c.all_gather(view_f32(y.data() + 1, 4), view_f32(y.data(), y.size() - 1), {}); },
                 "an overlapping gather");
  expect_invalid([&] { c.broadcast(view(x), c.size(), {}); }, "a root outside");
  expect_invalid([&] { c.broadcast(view(x), -1, {}); }, "a negative root");
  c.poll_error();
  EXPECT_EQ(sum_of(c, 1), float(c.size()));
}

// ---- verdicts -----------------------------------------------------------------------------------

VerdictRecord vote(float bound, Outcome outcome = Outcome::Certified, uint64_t step = kStep) {
  VerdictRecord r;
  r.max.severity = severity(outcome);
  r.max.bound = r.max.relative = r.max.candidate = r.max.candidate_relative = bound_key(bound);
  r.sum.votes = 1;
  set_step(r, step);
  return r;
}

VerdictRecord reduced(Communicator& c, VerdictRecord mine) {
  c.reduce_verdict({&mine, 1}, {});
  c.wait(kSilence);
  return mine;
}

void a_verdict_takes_the_worst_and_counts_all(Communicator& c) {
  std::vector<VerdictRecord> records(33);
  for (size_t s = 0; s < records.size(); ++s) {
    const bool worst_is_here = int(s % size_t(c.size())) == c.rank();
    records[s] = vote(worst_is_here ? 0.5f : 0.25f, worst_is_here ? Outcome::Exact : Outcome::Certified);
    records[s].sum.certified = 3;
    records[s].sum.rungs[2] = s;
    records[s].sum.paged_bytes = uint64_t(1) << 40;
    records[s].max.error = uint64_t(c.rank());
  }
  c.reduce_verdict(records, {});
  c.wait(kSilence);
  const uint64_t p = uint64_t(c.size());
  for (size_t s = 0; s < records.size(); ++s) {
    EXPECT_TRUE(verdict_agreed(records[s], p, kStep));
    EXPECT_EQ(outcome_of_severity(records[s].max.severity), Outcome::Exact);
    EXPECT_EQ(records[s].max.bound, bound_key(0.5f));
    EXPECT_EQ(records[s].max.error, p - 1);
    EXPECT_EQ(records[s].sum.certified, 3 * p);
    EXPECT_EQ(records[s].sum.rungs[2], s * p);
    EXPECT_EQ(records[s].sum.paged_bytes, p << 40);
  }
}

void a_nan_bound_of_any_rank_is_seen_by_every_rank(Communicator& c) {
  for (int r = 0; r < c.size(); ++r) {
    for (const float bad : {kNan, -kNan, -1.0f, -kInf}) {
      const VerdictRecord all = reduced(c, vote(c.rank() == r ? bad : kInf));
      EXPECT_GT(all.max.bound, bound_key(kInf)) << bad << " of rank " << r << " was lost";
      EXPECT_GT(all.max.bound, bound_key(0.05f));
    }
  }
}

void a_bound_of_minus_zero_is_zero(Communicator& c) {
  EXPECT_EQ(reduced(c, vote(-0.0f)).max.bound, 0u);
  for (int r = 0; r < c.size(); ++r) {  // and does not hide another rank's NaN
    if (c.size() > 1) {
      EXPECT_GT(reduced(c, vote(c.rank() == r ? kNan : -0.0f)).max.bound, bound_key(kInf));
    }
  }
}

void a_vote_for_another_step_is_no_agreement(Communicator& c) {
  for (int r = 0; r < c.size(); ++r) {
    for (const uint64_t other : {kStep - 1, kStep + 1, kStep + (uint64_t(1) << 32), uint64_t(0)}) {
      const VerdictRecord all =
          reduced(c, vote(0.01f, Outcome::Certified, c.rank() == r ? other : kStep));
      EXPECT_FALSE(verdict_agreed(all, uint64_t(c.size()), kStep)) << other << " of rank " << r;
    }
  }
}

void a_missing_vote_is_no_agreement(Communicator& c) {
  for (int r = 0; r < c.size(); ++r) {
    VerdictRecord mine = vote(0.01f);
    if (c.rank() == r) mine.sum.votes = 0;
    EXPECT_FALSE(verdict_agreed(reduced(c, mine), uint64_t(c.size()), kStep));
    mine = vote(0.01f);
    if (c.rank() == r) mine.sum.votes = 2;
    EXPECT_FALSE(verdict_agreed(reduced(c, mine), uint64_t(c.size()), kStep));
    if (c.rank() == r) mine = failed_verdict();
    EXPECT_FALSE(verdict_agreed(reduced(c, mine), uint64_t(c.size()), kStep));
  }
}

void a_verdict_is_failed_until_it_has_been_waited_for(Communicator& c) {
  std::vector<VerdictRecord> records(3, vote(0.01f));
  c.reduce_verdict(records, {});
  for (const VerdictRecord& r : records) {
    EXPECT_FALSE(verdict_agreed(r, uint64_t(c.size()), kStep));
    EXPECT_EQ(outcome_of_severity(r.max.severity), Outcome::Failed);
    EXPECT_GT(r.max.bound, bound_key(kInf));
    EXPECT_EQ(r.sum.votes, 0u);
  }
  c.wait(kSilence);
  for (const VerdictRecord& r : records) EXPECT_TRUE(verdict_agreed(r, uint64_t(c.size()), kStep));
}

// ---- liveness -----------------------------------------------------------------------------------

void a_rank_that_computes_for_long_is_no_fault_while_it_is_alive(Communicator& c) {
  constexpr std::chrono::milliseconds kShort{400};
  for (const int busy : {0, c.size() - 1}) {
    if (c.rank() == busy) {
      const Deadline end = Deadline::after(2 * kShort);
      while (!end.passed()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
        c.alive();
      }
    }
    c.barrier({});
    c.wait(kShort);
  }
}

void peers_have_names(Communicator& c) {
  for (int r = 0; r < c.size(); ++r) {
    EXPECT_NE(c.peer_name(r).find("rank " + std::to_string(r)), std::string::npos);
    EXPECT_NE(c.peer_name(r).find('('), std::string::npos);
  }
}

// ---- messages -----------------------------------------------------------------------------------

std::string text_of(int from, int to, int number, size_t length) {
  std::string text = fmt::format("{}>{}#{}:", from, to, number);
  while (text.size() < length) text.push_back(char(text.size() * 31));  // zeros among them
  return text;
}

void messages_arrive_in_order_from_each_rank(MessageChannel& c) {
  const std::vector<size_t> lengths = {0, 1, 100, 5000, 3000000, 10};
  for (int to = 0; to < c.size(); ++to) {  // itself included
    for (size_t i = 0; i < lengths.size(); ++i) {
      c.send(to, text_of(c.rank(), to, int(i), lengths[i]));
    }
  }
  for (int from = c.size() - 1; from >= 0; --from) {
    for (size_t i = 0; i < lengths.size(); ++i) {
      const Message m = c.receive(from, kSilence);
      EXPECT_EQ(m.from, from);
      EXPECT_TRUE(m.bytes == text_of(from, c.rank(), int(i), lengths[i])) << i << " from " << from;
    }
  }
  c.flush(kSilence);
  EXPECT_FALSE(c.try_receive().has_value());
}

void a_leader_deals_and_gathers_by_polling(MessageChannel& c) {
  constexpr int kRounds = 20;
  if (c.rank() == 0) {
    for (int i = 0; i < kRounds; ++i) {
      for (int to = 1; to < c.size(); ++to) c.send(to, fmt::format("work {}", i));
    }
    int answers = 0;
    const Deadline end = Deadline::after(kSilence);
    while (answers < kRounds * (c.size() - 1) && !end.passed()) {
      if (const auto m = c.try_receive()) {
        EXPECT_EQ(m->bytes.substr(0, 5), "done ") << m->from;
        ++answers;
      }
    }
    EXPECT_EQ(answers, kRounds * (c.size() - 1));
  } else {
    for (int i = 0; i < kRounds; ++i) {
      EXPECT_EQ(c.receive(0, kSilence).bytes, fmt::format("work {}", i));
      c.send(0, fmt::format("done {}", i));
    }
  }
  c.flush(kSilence);
}

void an_empty_message_is_a_message(MessageChannel& c) {
  c.send((c.rank() + 1) % c.size(), "");
  const Message m = c.receive((c.rank() + c.size() - 1) % c.size(), kSilence);
  EXPECT_TRUE(m.bytes.empty());
  c.flush(kSilence);
}

void ranks_outside_are_refused(MessageChannel& c) {
  expect_invalid([&] { c.send(c.size(), "x"); }, "a receiver outside");
  expect_invalid([&] { c.send(-1, "x"); }, "a negative receiver");
  expect_invalid([&] { c.receive(c.size(), kSilence); }, "a sender outside");
}

}  // namespace

const std::vector<CommunicatorCase>& communicator_contract() {
  static const std::vector<CommunicatorCase> cases = {
      {"SumsAddEveryRankOnce", sums_add_every_rank_once},
      {"SumsHaveTheSameBitsOnEveryRank", sums_have_the_same_bits_on_every_rank},
      {"SumsKeepInfinitiesAndNan", sums_keep_infinities_and_nan},
      {"SumsOf16BitsAreMadeInFp32AndRoundedOnce", sums_of_16_bits_are_made_in_fp32_and_rounded_once},
      {"SumsOfU64Wrap", sums_of_u64_wrap},
      {"GathersAreInRankOrder", gathers_are_in_rank_order},
      {"GathersCarryAnyType", gathers_carry_any_type},
      {"BroadcastsComeFromTheRoot", broadcasts_come_from_the_root},
      {"BarriersWaitForTheLast", barriers_wait_for_the_last},
      {"SeveralOperationsMayBeUnderWay", several_operations_may_be_under_way},
      {"ViewsThatDoNotFitAreRefusedAndTheGroupStaysWhole",
       views_that_do_not_fit_are_refused_and_the_group_stays_whole},
      {"AVerdictTakesTheWorstAndCountsAll", a_verdict_takes_the_worst_and_counts_all},
      {"ANanBoundOfAnyRankIsSeenByEveryRank", a_nan_bound_of_any_rank_is_seen_by_every_rank},
      {"ABoundOfMinusZeroIsZero", a_bound_of_minus_zero_is_zero},
      {"AVoteForAnotherStepIsNoAgreement", a_vote_for_another_step_is_no_agreement},
      {"AMissingVoteIsNoAgreement", a_missing_vote_is_no_agreement},
      {"AVerdictIsFailedUntilItHasBeenWaitedFor", a_verdict_is_failed_until_it_has_been_waited_for},
      {"ARankThatComputesForLongIsNoFaultWhileItIsAlive",
       a_rank_that_computes_for_long_is_no_fault_while_it_is_alive},
      {"PeersHaveNames", peers_have_names},
  };
  return cases;
}

const std::vector<ChannelCase>& channel_contract() {
  static const std::vector<ChannelCase> cases = {
      {"MessagesArriveInOrderFromEachRank", messages_arrive_in_order_from_each_rank},
      {"ALeaderDealsAndGathersByPolling", a_leader_deals_and_gathers_by_polling},
      {"AnEmptyMessageIsAMessage", an_empty_message_is_a_message},
      {"RanksOutsideAreRefused", ranks_outside_are_refused},
  };
  return cases;
}

}  // namespace certkv
