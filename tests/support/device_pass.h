// One pass of the device over the blocks of a sealed head: everything it reads laid out, the pass
// run by a backend (the emulation, or a GPU), and its state read back.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/cuda/pass.h"
#include "runtime/certify/certificate.h"

namespace certkv {

// Where a pass runs. Memory is given back when the backend goes.
class PassBackend {
 public:
  virtual ~PassBackend() = default;
  virtual std::byte* put(const void* from, size_t bytes) = 0;  // a copy, 16-byte aligned
  virtual void get(const std::byte* at, void* to, size_t bytes) = 0;
  virtual void run(const cuda::PassArgs& args, const cuda::PassShape& shape) = 0;
};
// Of the program's kind: tests/kernels/emulated_backend.cc or tests/gpu/gpu_backend.cu.
std::unique_ptr<PassBackend> make_pass_backend();
bool pass_backend_answers();

// For tests that run on a backend: each with every kind of page, and every number of warps that a
// block may have. A program instantiates it with kEveryVariant.
struct PassVariant {
  const char* layout;
  int warps;
};
class OnDevice : public testing::TestWithParam<PassVariant> {
 protected:
  static int warps() { return GetParam().warps; }
  static const char* layout() { return GetParam().layout; }
  void SetUp() override {
    if (!pass_backend_answers()) GTEST_SKIP() << "no device answers";
  }
};
inline std::vector<PassVariant> every_variant() {
  std::vector<PassVariant> all;
  for (const cuda::PageKind kind : cuda::kPageKinds)
    for (const int warps : {cuda::warp_counts(kind).most, cuda::warp_counts(kind).fewest})
      all.push_back({cuda::page_kind_name(kind), warps});
  return all;
}
inline const auto kEveryVariant = testing::ValuesIn(every_variant());
inline std::string variant_name(const testing::TestParamInfo<PassVariant>& info) {
  return std::string(info.param.layout) + "With" + std::to_string(info.param.warps) + "Warps";
}

struct DevicePassOptions {
  int warps = 0;  // of a block; 0: the most
  int pages_per_split = 8;
  bool certificate = true;
  std::function<void(std::byte* page)> damage =
      nullptr;            // every converted page, before it is handed over
  int missing_slot = -1;  // block whose wanted originals no slot holds
};

class DevicePass {
 public:
  DevicePass(const AttendContext& context, const QueryGroup& q, std::span<const BlockRef> blocks,
             const DevicePassOptions& options = {});

  PassState state;
  uint32_t flags = 0;
  std::vector<float> out;  // [heads, head_dim]
  // As the device judged them, by a tolerance relative to S.
  static constexpr double kTolerance = 0.05;
  std::vector<Certificate> judged;  // [heads]
  uint32_t failing = 0;             // bit h: head h is not within it
  uint32_t any_failing = 0;

  // Certificates of its outputs from the state, by the host's sums over blocks.
  std::vector<Certificate> judge() const;
  // Whether the device's and the host's certificates say the same, beside what they round apart.
  testing::AssertionResult judged_alike() const;
};

}  // namespace certkv
