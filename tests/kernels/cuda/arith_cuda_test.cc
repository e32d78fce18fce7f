#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "tests/kernels/cuda/arith_probe.h"

namespace certkv {
namespace {

const char* const kNames[kProbeResults] = {
    "f16_to_float", "bf16_to_float", "float_to_f16", "float_to_bf16", "exp_nonpositive",
    "gamma_n",      "positive_part", "bound_key",    "severity",      "verdict_agreed"};

std::vector<uint64_t> by_host_compiler() {
  std::vector<uint64_t> results(size_t(kProbeInputs) * kProbeResults);
  for (uint32_t i = 0; i < kProbeInputs; ++i) probe_arith(i, &results[size_t(i) * kProbeResults]);
  return results;
}

void expect_same(const std::vector<uint64_t>& got, const std::vector<uint64_t>& want) {
  for (int k = 0; k < kProbeResults; ++k) {
    int different = 0;
    for (uint32_t i = 0; i < kProbeInputs; ++i) {
      const size_t at = size_t(i) * kProbeResults + k;
      if (got[at] == want[at]) continue;
      if (++different == 1) {
        ADD_FAILURE() << kNames[k] << " of input " << i << " (" << probe_input(i) << ") is 0x"
                      << std::hex << got[at] << ", the host compiler says 0x" << want[at];
      }
    }
    EXPECT_EQ(different, 0) << "inputs on which " << kNames[k] << " differs";
  }
}

TEST(ArithUnderNvcc, ItsHostPassAgreesBitForBit) {
  std::vector<uint64_t> results(size_t(kProbeInputs) * kProbeResults, 0xdead);
  probe_arith_by_nvcc(results.data());
  expect_same(results, by_host_compiler());
}

TEST(ArithUnderNvcc, ADeviceAgreesBitForBit) {
  std::vector<uint64_t> results(size_t(kProbeInputs) * kProbeResults, 0xdead);
  if (!probe_arith_on_device(results.data())) GTEST_SKIP() << "no device answers";
  expect_same(results, by_host_compiler());
}

}  // namespace
}  // namespace certkv
