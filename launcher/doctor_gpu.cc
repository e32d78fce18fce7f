#include "launcher/doctor_gpu.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "runtime/byte_size.h"
#ifdef CERTKV_WITH_CUDA
#include "kernels/cuda/cuda_build.h"
#include "parallel/nccl_binding.h"
#endif

namespace certkv {

namespace {

using Json = nlohmann::ordered_json;

constexpr int kOldestCapability = 80;  // as the device asks for it

std::string cuda_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

std::string capability_text(int capability) {
  return fmt::format("{}.{}", capability / 10, capability % 10);
}

GpuLine driver_line(const CudaDriver& driver, const GpuBuild& build) {
  const std::string cuda = driver.version == 0 ? "" : cuda_text(driver.version);
  std::vector<std::string> words;
  if (!driver.kernel.empty()) words.push_back(driver.kernel);
  if (!cuda.empty()) words.push_back("CUDA " + cuda);
  std::string error = driver.error;
  // As the device itself refuses it: the newest runtime of the same major version is served.
  if (error.empty() && driver.version / 1000 < build.toolkit / 1000) {
    error =
        fmt::format("too old: this build needs CUDA {}; update it, or build with an older toolkit",
                    cuda_text(build.toolkit));
  }
  if (!error.empty()) words.push_back(error + "; jobs run on the CPU alone (run.backend cpu)");
  return {"driver",
          {{"version", driver.kernel}, {"cuda", cuda}, {"error", error}},
          fmt::format("{}", fmt::join(words, ", "))};
}

GpuLine gpus_line(const CudaDriver& driver, const GpuBuild& build) {
  Json gpus = Json::array();
  std::vector<std::string> texts;
  for (const Gpu& gpu : driver.gpus) {
    // What is compiled for an older architecture runs on newer ones, never the other way.
    const bool too_old = gpu.capability < std::max(kOldestCapability, build.architectures.front());
    gpus.push_back({{"name", gpu.name},
                    {"memory_bytes", gpu.memory_bytes},
                    {"capability", capability_text(gpu.capability)},
                    {"usable", !too_old}});
    texts.push_back(gpu.capability == 0 ? gpu.name  // that it does not answer
                                        : fmt::format("{} ({}, compute capability {}{})", gpu.name,
                                                      byte_size_text(gpu.memory_bytes),
                                                      capability_text(gpu.capability),
                                                      too_old ? ": too old for this build" : ""));
  }
  return {"gpus", gpus, texts.empty() ? "none" : fmt::format("{}", fmt::join(texts, ", "))};
}

GpuLine library_line(const char* name, const std::string& soname, const FoundLibrary& found,
                     const char* purpose) {
  std::string text;
  if (soname.empty()) {
    text = fmt::format("built without, needed for {}", purpose);
  } else if (found.path.empty()) {
    text = fmt::format(
        "{} is missing, needed for {} ({}). Install it, or name its folder in "
        "LD_LIBRARY_PATH",
        soname, purpose, found.error);
  } else {
    text = fmt::format("{} ({})", found.version, found.path);
  }
  return {name,
          {{"soname", soname}, {"version", found.version}, {"path", found.path}},
          std::move(text)};
}

}  // namespace

GpuSide inspect_gpu_side() {
  GpuSide side;
  side.driver = cuda_driver();
#ifdef CERTKV_WITH_CUDA
  cuda::CudaBuild built = cuda::cuda_build();
  side.build = GpuBuild{.toolkit = built.toolkit,
                        .architectures = std::move(built.architectures),
                        .cublaslt = std::move(built.cublaslt),
                        .cudnn = std::move(built.cudnn),
                        .nccl = nccl_is_built() ? "libnccl.so.2" : ""};
  const auto find = [](VendorLibrary which, const std::string& soname) {
    return soname.empty() ? FoundLibrary{} : find_library(which, soname);
  };
  side.cublaslt = find(VendorLibrary::CublasLt, side.build->cublaslt);
  side.cudnn = find(VendorLibrary::Cudnn, side.build->cudnn);
  side.nccl = find(VendorLibrary::Nccl, side.build->nccl);
#endif
  return side;
}

std::vector<GpuLine> gpu_lines(const GpuSide& side) {
  if (!side.build) {
    std::string text = "none: this is a CPU-only build";
    if (const size_t n = side.driver.gpus.size(); n > 0) {
      text += fmt::format("; the preset cuda would use the {} GPU{} here", n, n == 1 ? "" : "s");
    }
    return {{"backend", "none", text}};
  }
  const GpuBuild& build = *side.build;
  std::vector<std::string> names;
  for (const int architecture : build.architectures) {
    names.push_back(fmt::format("sm_{}", architecture));
  }
  return {
      {"backend",
       {{"toolkit", cuda_text(build.toolkit)}, {"architectures", names}},
       fmt::format("CUDA {}, compiled for {}", cuda_text(build.toolkit), fmt::join(names, ", "))},
      driver_line(side.driver, build),
      gpus_line(side.driver, build),
      library_line("cublaslt", build.cublaslt, side.cublaslt, "products with weights on a GPU"),
      library_line("cudnn", build.cudnn, side.cudnn, "dense attention on a GPU"),
      library_line("nccl", build.nccl, side.nccl,
                   "several ranks on GPUs (parallel.tensor above 1)"),
  };
}

}  // namespace certkv
