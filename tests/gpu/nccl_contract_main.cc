// The contract of communicators over NCCL on GPUs, and its faults, with one process per rank:
//   mpirun -np 2 gpu_nccl_contract [contract | late | late-graph | stop | abort] [gtest flags]
// Ranks share GPUs where there are fewer of them: NCCL then takes each for a host of its own and
// goes over sockets. Exits with 77 where no GPU answers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <thread>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "parallel/mpi_session.h"
#include "parallel/nccl_binding.h"
#include "parallel/nccl_communicator.h"
#include "parallel/topology.h"
#include "tests/parallel/communicator_contract.h"

namespace certkv {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kSilence{10000};
constexpr milliseconds kShort{2000};  // silence allowed where a rank will be silent
constexpr milliseconds kNoticed{
    5000};  // from a fault to its error: silence, abort, and time to spare
constexpr int kSkipped = 77;

NcclCommunicator* world = nullptr;
cuda::CudaDevice* gpu = nullptr;

class NcclCommunicators : public testing::TestWithParam<CommunicatorCase> {};
TEST_P(NcclCommunicators, KeepTheContract) {
  GetParam().check(*world);
}
INSTANTIATE_TEST_SUITE_P(Contract, NcclCommunicators, testing::ValuesIn(communicator_contract()),
                         [](const auto& c) { return std::string(c.param.sentence); });

TEST(NcclDeviceViews, AreUsedWhereTheyLie) {
  constexpr size_t n = 100003;  // no multiple of anything a kernel likes
  const cuda::DeviceArray<float> sums(*gpu, n, "test"),
      all(*gpu, n * size_t(world->size()), "test");
  const cuda::DeviceArray<uint16_t> halves(*gpu, n, "test");
  std::vector<float> x(n), gathered(all.count());
  std::vector<uint16_t> h(n);
  for (size_t i = 0; i < n; ++i) {
    x[i] = float(i % 1000) + 1000.0f * float(world->rank());
    h[i] = float_to_bf16(world->rank() == 0 ? 256.0f : float(i % 3));
  }
  gpu->copy(sums.data(), x.data(), sums.bytes());
  gpu->copy(halves.data(), h.data(), halves.bytes());
  const Stream stream{gpu->stream()};
  const auto view = [](void* data, uint64_t count, DType type) {
    return TensorView{data, count, type, MemoryKind::Device};
  };
  world->all_gather(view(sums.data(), n, DType::F32), view(all.data(), all.count(), DType::F32),
                    stream);
  world->all_reduce_sum(view(sums.data(), n, DType::F32), stream);
  world->all_reduce_sum(view(halves.data(), n, DType::BF16), stream);
  gpu->copy(x.data(), sums.data(), sums.bytes());
  gpu->copy(gathered.data(), all.data(), all.bytes());
  gpu->copy(h.data(), halves.data(), halves.bytes());
  world->wait(kSilence);
  const float p = float(world->size());
  size_t wrong = 0;
  for (size_t i = 0; i < n; ++i) {
    wrong += x[i] != p * float(i % 1000) + 1000.0f * p * (p - 1) / 2;
    wrong += h[i] != float_to_bf16(256.0f + (p - 1) * float(i % 3));
  }
  for (size_t i = 0; i < gathered.size(); ++i)
    wrong += gathered[i] != float(i % n % 1000) + 1000.0f * float(i / n);
  EXPECT_EQ(wrong, 0u);
}

// A decode step is captured once and launched for every token.
TEST(NcclGraphs, DoTheSumsThatTheyHaveCaptured) {
  constexpr size_t n = 4096;
  constexpr int kLaunches = 3;
  const cuda::DeviceArray<float> sums(*gpu, n, "test");
  const cuda::DeviceArray<uint16_t> halves(*gpu, n, "test");
  const std::vector<float> ones(n, 1);
  const std::vector<uint16_t> half_ones(n, float_to_f16(1));
  const TensorView sum_view{sums.data(), n, DType::F32, MemoryKind::Device};
  const TensorView half_view{halves.data(), n, DType::F16, MemoryKind::Device};
  const auto fill = [&] {
    gpu->copy(sums.data(), ones.data(), sums.bytes());
    gpu->copy(halves.data(), half_ones.data(), halves.bytes());
  };
  const auto step = [&] {
    world->all_reduce_sum(sum_view, {});
    world->all_reduce_sum(half_view, {});
  };
  fill();
  step();  // connects, and allocates: neither may happen in a capture
  world->wait(kSilence);
  ASSERT_EQ(world->capture(1, step), "");
  fill();
  for (int i = 0; i < kLaunches; ++i) world->launch(1);
  world->wait(kSilence);  // for what the graph enqueued
  std::vector<float> x(n);
  std::vector<uint16_t> h(n);
  ASSERT_EQ(cudaMemcpy(x.data(), sums.data(), sums.bytes(), cudaMemcpyDeviceToHost), cudaSuccess);
  ASSERT_EQ(cudaMemcpy(h.data(), halves.data(), halves.bytes(), cudaMemcpyDeviceToHost),
            cudaSuccess);
  float expected = 1;
  for (int i = 0; i < kLaunches; ++i) expected *= float(world->size());
  EXPECT_EQ(x, std::vector<float>(n, expected));
  EXPECT_EQ(h, std::vector<uint16_t>(n, float_to_f16(expected)));
}

// What is captured last, alone, goes with the communicator; what came before, at once.
TEST(NcclGraphs, TakeThePlaceOfWhatWasCapturedBefore) {
  const cuda::DeviceArray<float> sum(*gpu, 1, "test");
  const TensorView view{sum.data(), 1, DType::F32, MemoryKind::Device};
  const auto launch = [&](float x) {
    gpu->copy(sum.data(), &x, sizeof x);
    world->launch(1);
    gpu->copy(&x, sum.data(), sizeof x);
    world->wait(kSilence);
    return x;
  };
  const float p = float(world->size());
  for (const int times : {1, 2, 1}) {
    ASSERT_EQ(world->capture(1,
                             [&] {
                               for (int i = 0; i < times; ++i) world->all_reduce_sum(view, {});
                             }),
              "");
    EXPECT_EQ(launch(3), times == 1 ? 3 * p : 3 * p * p);
  }
}

// What the steps cost, for the record; no claim.
TEST(NcclTimes, AreStated) {
  constexpr int kRounds = 20;
  VerdictRecord vote;
  auto start = steady_clock::now();
  for (int i = 0; i < kRounds; ++i) {
    vote = VerdictRecord{};
    world->reduce_verdict({&vote, 1}, {});
    world->wait(kSilence);
  }
  std::chrono::duration<double, std::micro> time = steady_clock::now() - start;
  if (world->rank() == 0) std::printf("reduce_verdict and wait: %.0f us\n", time.count() / kRounds);

  // A step's sums at batch 1: 32 layers, two sums of 4,096 floats each.
  constexpr int kSums = 64;
  constexpr size_t n = 4096;
  const cuda::DeviceArray<float> x(*gpu, n, "test");
  gpu->fill(x.data(), 0, x.bytes());
  const auto sums = [&] {
    for (int i = 0; i < kSums; ++i)
      world->all_reduce_sum({x.data(), n, DType::F32, MemoryKind::Device}, {});
  };
  for (const bool captured : {false, true}) {
    const std::string refused = captured ? world->capture(1, sums) : "";
    ASSERT_EQ(refused, "");
    for (int i = -1; i < kRounds; ++i) {
      if (i == 0) start = steady_clock::now();
      if (captured)
        world->launch(1);
      else
        sums();
      world->wait(kSilence);
    }
    time = steady_clock::now() - start;
    if (world->rank() == 0)
      std::printf("%d sums of %zu floats, %s, and wait: %.0f us\n", kSums, n,
                  captured ? "captured" : "one by one", time.count() / kRounds);
  }
}

int run_contract(int argc, char** argv, MpiSession& session) {
  testing::InitGoogleMock(&argc, argv);
  if (session.rank() != 0) {
    // One rank reports the course; failures of the others go to standard error.
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    class Failures : public testing::EmptyTestEventListener {
      void OnTestPartResult(const testing::TestPartResult& r) override {
        if (r.failed())
          std::fprintf(stderr, "rank failed: %s:%d %s\n", r.file_name(), r.line_number(),
                       r.summary());
      }
    };
    listeners.Append(new Failures);
  }
  uint64_t failed = uint64_t(RUN_ALL_TESTS());
  world->all_reduce_sum(view_u64(&failed, 1), {});
  world->wait(kSilence);
  return failed == 0 ? 0 : 1;
}

// Every rank prints "SAW <rank>: <error> after <ms>" or what it missed; 0 if all is as it should
// be.
int run_fault(std::string_view scenario, MpiSession& session) {
  float x = 1;
  world->all_reduce_sum(view_f32(&x, 1), {});
  world->wait(kSilence);
  const bool graph = scenario == "late-graph";
  const cuda::DeviceArray<float> on_device(*gpu, 1, "test");
  if (graph) {
    const std::string refused = world->capture(1, [&] {
      world->all_reduce_sum({on_device.data(), 1, DType::F32, MemoryKind::Device}, {});
    });
    if (!refused.empty()) {
      std::printf("REFUSED %d: %s\n", session.rank(), refused.c_str());
      return 1;
    }
    world->launch(1);
    world->wait(kSilence);
  }
  const bool culprit = session.rank() == session.size() - 1;
  const auto start = steady_clock::now();
  try {
    if (culprit && (graph || scenario == "late")) std::this_thread::sleep_for(2 * kNoticed);
    if (culprit && scenario == "stop") raise(SIGSTOP);
    if (culprit && scenario == "abort") world->abort("on fire");
    if (graph)
      world->launch(1);
    else
      world->all_reduce_sum(view_f32(&x, 1), {});
    world->wait(kShort);
    std::printf("NOTHING %d\n", session.rank());
  } catch (const Error& error) {
    const milliseconds after =
        std::chrono::duration_cast<milliseconds>(steady_clock::now() - start);
    std::printf("SAW %d: %s: %s; after %d ms\n", session.rank(), error_kind_name(error.kind()),
                error.what(), int(after.count()));
    std::fflush(stdout);
    const ErrorKind kind = scenario == "abort" ? ErrorKind::CommError : ErrorKind::DeadlineExceeded;
    if (error.kind() == kind && (culprit || after < kNoticed * kDeadlineFactor)) {
      if (culprit) std::this_thread::sleep_for(kNoticed);  // the others' word counts
      return 4;
    }
  }
  return 1;
}

}  // namespace
}  // namespace certkv

int main(int argc, char** argv) {
  using namespace certkv;
  const int gpus = cuda::cuda_device_count();
  if (gpus == 0) {
    std::fprintf(stderr, "skipped: no NVIDIA GPU answers on this machine\n");
    return kSkipped;
  }
  const std::string_view scenario = argc > 1 ? argv[1] : "contract";
  MpiSession session;
  int code = 1;
  try {
    auto control = session.world();
    control->set_silence(kSilence);
    const Topology topology = gather_topology(*control, kSilence);
    if (topology.local_size > gpus) {
      // NCCL refuses two ranks on one GPU of one host.
      setenv("NCCL_HOSTID", fmt::format("rank-{}", session.rank()).c_str(), 1);
    }
    const auto device = cuda::make_cuda_device(topology.local_rank % gpus);
    const auto nccl = make_nccl_device(*device);
    const auto api = load_nccl();
    const auto start = steady_clock::now();
    const auto communicator = make_nccl_communicator(std::move(control), api, *nccl);
    if (session.rank() == 0) {
      std::printf("%s, %d ranks, %d GPUs (%s); the start took %.1f s\n", api->name.c_str(),
                  session.size(), gpus, device->name().c_str(),
                  std::chrono::duration<double>(steady_clock::now() - start).count());
    }
    world = communicator.get();
    gpu = device.get();
    code =
        scenario == "contract" ? run_contract(argc, argv, session) : run_fault(scenario, session);
    std::fflush(stdout);
    if (scenario != "contract") session.abort(code);  // a broken job ends here
  } catch (const Error& error) {
    std::fprintf(stderr, "rank %d: %s: %s\n", session.rank(), error_kind_name(error.kind()),
                 error.what());
    session.abort(1);
  }
  if (!session.finish()) session.abort(1);
  return code;
}
