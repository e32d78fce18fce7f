// The GPU side of `certkv doctor`: what this build can use, and what the machine has of it.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "parallel/installed_libraries.h"

namespace certkv {

// The CUDA backend of a build.
struct GpuBuild {
  int toolkit = 0;                    // 13000 for 13.0
  std::vector<int> architectures;     // 90 for sm_90, ascending
  std::string cublaslt, cudnn, nccl;  // sonames; empty: built without
};
struct GpuSide {
  std::optional<GpuBuild> build;  // none: a CPU-only build
  CudaDriver driver;
  FoundLibrary cublaslt, cudnn, nccl;  // looked for where the build uses them
};
GpuSide inspect_gpu_side();

// A line of the report: its name, its value in JSON, its text.
struct GpuLine {
  std::string name;
  nlohmann::ordered_json value;
  std::string text;
};
// One line for a CPU-only build; else backend, driver, gpus and each library, with what does not
// work where something is missing.
std::vector<GpuLine> gpu_lines(const GpuSide& side);

}  // namespace certkv
