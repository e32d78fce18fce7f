// The communicator over NCCL without a GPU: its contract on a fake NCCL of thread ranks, and what
// it adds to it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/parallel/communicator_contract.h"
#include "tests/parallel/nccl_ranks.h"

namespace certkv {
namespace {

using ::testing::HasSubstr;

// ---- the contract -------------------------------------------------------------------------------

class NcclCommunicators : public testing::TestWithParam<std::tuple<CommunicatorCase, int>> {};
TEST_P(NcclCommunicators, KeepTheContract) {
  const auto& [c, ranks] = GetParam();
  FakeNccl nccl(ranks);
  run_ranks(ranks, nccl, [&c = c](Rank& rank) { c.check(*rank.communicator()); });
  EXPECT_EQ(nccl.calls().unique_ids, 1);
  EXPECT_EQ(nccl.calls().destroys, ranks);
  EXPECT_EQ(nccl.calls().aborts, 0);
}
INSTANTIATE_TEST_SUITE_P(Contract, NcclCommunicators,
                         testing::Combine(testing::ValuesIn(communicator_contract()),
                                          testing::Values(1, 2, 3, 4)),
                         [](const auto& p) {
                           return fmt::format("{}_{}ranks", std::get<0>(p.param).sentence,
                                              std::get<1>(p.param));
                         });

TEST(NcclDeviceViews, AreUsedWhereTheyLie) {
  FakeNccl nccl(3);
  run_ranks(3, nccl, [](Rank& rank) {
    const auto c = rank.communicator();
    constexpr size_t n = 1000;
    cuda::Device& device = rank.device.device();
    const cuda::DeviceArray<float> sum(device, n, "test"), own(device, n, "test"),
        all(device, 3 * n, "test");
    const cuda::DeviceArray<uint16_t> half(device, n, "test");
    for (size_t i = 0; i < n; ++i) {
      sum.data()[i] = own.data()[i] = float(i) + 1000.0f * float(rank.rank);
      half.data()[i] = float_to_bf16(rank.rank == 0 ? 256.0f : 1.0f);
    }
    const uint64_t before = rank.device.allocations();
    const Stream stream{rank.device.stream()};
    const auto view = [](void* data, size_t count, DType type) {
      return TensorView{data, count, type, MemoryKind::Device};
    };
    c->all_reduce_sum(view(sum.data(), n, DType::F32), stream);
    c->all_gather(view(own.data(), n, DType::F32), view(all.data(), 3 * n, DType::F32), stream);
    c->broadcast(view(own.data(), n, DType::F32), 2, stream);
    EXPECT_EQ(rank.device.allocations(), before) << "nothing of it needs staging";
    c->all_reduce_sum(view(half.data(), n, DType::BF16), stream);
    c->wait(kLong);
    for (size_t i = 0; i < n; ++i) {
      ASSERT_EQ(sum.data()[i], 3 * float(i) + 3000.0f);
      ASSERT_EQ(all.data()[2 * n + i], float(i) + 2000.0f);
      ASSERT_EQ(own.data()[i], float(i) + 2000.0f);
      ASSERT_EQ(half.data()[i], float_to_bf16(258.0f));
    }
  });
}

TEST(NcclDeviceViews, OfOtherStreamsOrMixedMemoryAreRefused) {
  FakeNccl nccl(1);
  run_ranks(1, nccl, [](Rank& rank) {
    const auto c = rank.communicator();
    float x = 1;
    const cuda::DeviceArray<float> on_device(rank.device.device(), 1, "test");
    EXPECT_THAT(
        error_of([&] { c->all_reduce_sum(view_f32(&x, 1), {&x}); }, ErrorKind::InvalidArgument),
        HasSubstr("stream"));
    EXPECT_THAT(error_of(
                    [&] {
                      c->all_gather(view_f32(&x, 1),
                                    {on_device.data(), 1, DType::F32, MemoryKind::Device}, {});
                    },
                    ErrorKind::InvalidArgument),
                HasSubstr("one of in and out"));
    c->all_reduce_sum(view_f32(&x, 1), {});
    c->wait(kLong);
    EXPECT_EQ(x, 1.0f);
  });
}

TEST(NcclStaging, IsAllocatedOnceAndKept) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [](Rank& rank) {
    const auto c = rank.communicator();
    std::vector<float> x(100000, 1);
    uint64_t after_first = 0;
    for (int round = 0; round < 10; ++round) {
      std::vector<VerdictRecord> votes(4);
      c->all_reduce_sum(view_f32(x.data(), x.size()), {});
      c->reduce_verdict(votes, {});
      c->barrier({});
      c->wait(kLong);
      if (round == 0) after_first = rank.device.allocations();
    }
    EXPECT_GT(after_first, 0u);
    EXPECT_EQ(rank.device.allocations(), after_first);
    EXPECT_EQ(x[0], 1024.0f);
  });
}

// Larger than one piece of a sum in rank order, and no multiple of it.
TEST(NcclSums, OfManyHalvesAreMadeInPieces) {
  FakeNccl nccl(2);
  run_ranks(2, nccl, [](Rank& rank) {
    const auto c = rank.communicator();
    std::vector<uint16_t> x((size_t(1) << 21) + 3);
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = float_to_f16(float(i % 512) * float(rank.rank + 1));
    c->all_reduce_sum({x.data(), x.size(), DType::F16, MemoryKind::Host}, {});
    c->wait(kLong);
    size_t wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) wrong += f16_to_float(x[i]) != 3.0f * float(i % 512);
    EXPECT_EQ(wrong, 0u);
  });
}

TEST(NcclSums, MapEveryTypeToWhatNcclCanKeep) {
  EXPECT_EQ(nccl_sum(DType::F32), NcclSum::Float32);
  EXPECT_EQ(nccl_sum(DType::U64), NcclSum::Uint64);
  EXPECT_EQ(nccl_sum(DType::F16), NcclSum::InRankOrder);
  EXPECT_EQ(nccl_sum(DType::BF16), NcclSum::InRankOrder);
  for (const DType t : {DType::F64, DType::U8, DType::I8, DType::I32, DType::I64})
    EXPECT_EQ(nccl_sum(t), NcclSum::None) << dtype_name(t);
}

}  // namespace
}  // namespace certkv
