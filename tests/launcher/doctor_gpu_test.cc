// What `certkv doctor` says of the GPU side, where there is a GPU and where there is none.
#include "launcher/doctor_gpu.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "launcher/commands.h"

namespace certkv {
namespace {

using testing::HasSubstr;

GpuLine line(const GpuSide& side, const std::string& name) {
  for (const GpuLine& l : gpu_lines(side)) {
    if (l.name == name) return l;
  }
  ADD_FAILURE() << "no line " << name;
  return {};
}

// A CUDA 13.0 build for sm_80 and sm_90 on a machine that has everything.
GpuSide whole() {
  GpuSide side;
  side.build = GpuBuild{.toolkit = 13000,
                        .architectures = {80, 90},
                        .cublaslt = "libcublasLt.so.13",
                        .cudnn = "libcudnn.so.9",
                        .nccl = "libnccl.so.2"};
  side.driver = cuda_driver(CERTKV_STAND_IN);
  side.cublaslt = find_library(VendorLibrary::CublasLt, CERTKV_STAND_IN);
  side.cudnn = find_library(VendorLibrary::Cudnn, CERTKV_STAND_IN);
  side.nccl = find_library(VendorLibrary::Nccl, CERTKV_STAND_IN);
  return side;
}

TEST(InstalledLibraries, ReadTheDriverAndItsGpus) {
  const CudaDriver driver = cuda_driver(CERTKV_STAND_IN);
  EXPECT_TRUE(driver.loaded);
  EXPECT_EQ(driver.error, "");
  EXPECT_EQ(driver.version, 13010);
  ASSERT_EQ(driver.gpus.size(), 3u);
  EXPECT_EQ(driver.gpus[0].name, "Stand-in 100");
  EXPECT_EQ(driver.gpus[0].memory_bytes, uint64_t(80) << 30);
  EXPECT_EQ(driver.gpus[0].capability, 90);
  EXPECT_EQ(driver.gpus[1].capability, 75);
  EXPECT_EQ(driver.gpus[2].name, "does not answer");
  EXPECT_EQ(driver.gpus[2].capability, 0);
}

TEST(InstalledLibraries, SayThatThereIsNoDriverOrNoneThatCanBeUsed) {
  const CudaDriver none = cuda_driver("libnone-of-this-name.so.1");
  EXPECT_FALSE(none.loaded);
  EXPECT_EQ(none.error, "libnone-of-this-name.so.1 was not found: no NVIDIA driver");
  const CudaDriver other = cuda_driver("libm.so.6");
  EXPECT_EQ(other.error, "libm.so.6 lacks functions that every driver has");
  EXPECT_TRUE(other.gpus.empty());
}

TEST(InstalledLibraries, TellEachVersionAsItsVendorCountsIt) {
  const GpuSide side = whole();
  EXPECT_EQ(side.cublaslt.version, "13.2.5");
  EXPECT_EQ(side.cudnn.version, "9.13.2");
  EXPECT_EQ(side.nccl.version, "2.28.9");
  for (const FoundLibrary* found : {&side.cublaslt, &side.cudnn, &side.nccl}) {
    EXPECT_EQ(found->path, CERTKV_STAND_IN);
    EXPECT_EQ(found->error, "");
  }
  const FoundLibrary missing = find_library(VendorLibrary::Cudnn, "libnone-of-this-name.so.9");
  EXPECT_EQ(missing.path, "");
  EXPECT_THAT(missing.error, HasSubstr("libnone-of-this-name.so.9"));
  // Found by soname: the linker's own path, and no version where it tells none.
  const FoundLibrary silent = find_library(VendorLibrary::Nccl, "libm.so.6");
  EXPECT_THAT(silent.path, testing::MatchesRegex("/.*/libm\\.so\\.6"));
  EXPECT_EQ(silent.version, "unknown");
}

TEST(DoctorGpu, NamesWhatIsThere) {
  const GpuSide side = whole();
  EXPECT_EQ(line(side, "backend").text, "CUDA 13.0, compiled for sm_80, sm_90");
  EXPECT_EQ(line(side, "backend").value.at("architectures").size(), 2u);
  EXPECT_THAT(line(side, "driver").text, HasSubstr("CUDA 13.1"));
  EXPECT_EQ(line(side, "driver").value.at("error"), "");
  EXPECT_THAT(line(side, "gpus").text,
              HasSubstr("Stand-in 100 (80.0 GiB, compute capability 9.0), Stand-in 101 (16.0 GiB, "
                        "compute capability 7.5: too old for this build), does not answer"));
  EXPECT_TRUE(line(side, "gpus").value.at(0).at("usable").get<bool>());
  EXPECT_FALSE(line(side, "gpus").value.at(1).at("usable").get<bool>());
  EXPECT_FALSE(line(side, "gpus").value.at(2).at("usable").get<bool>());
  EXPECT_EQ(line(side, "cublaslt").text, std::string("13.2.5 (") + CERTKV_STAND_IN + ")");
  EXPECT_EQ(line(side, "nccl").value.at("version"), "2.28.9");
}

TEST(DoctorGpu, SaysWhatDoesNotWorkWithoutALibrary) {
  GpuSide side = whole();
  side.cublaslt = find_library(VendorLibrary::CublasLt, "libnone-of-this-name.so");
  side.nccl = side.cublaslt;
  side.build->cudnn = "";
  side.cudnn = {};
  EXPECT_THAT(
      line(side, "cublaslt").text,
      HasSubstr(
          "libcublasLt.so.13 is missing, needed for products with weights on a GPU (libnone"));
  EXPECT_EQ(line(side, "cublaslt").value.at("path"), "");
  EXPECT_THAT(line(side, "nccl").text,
              HasSubstr("libnccl.so.2 is missing, needed for several ranks on GPUs"));
  EXPECT_EQ(line(side, "cudnn").text, "built without, needed for dense attention on a GPU");
}

TEST(DoctorGpu, SaysThatADriverIsAbsentOrTooOld) {
  GpuSide side = whole();
  side.driver = cuda_driver("libnone-of-this-name.so.1");
  EXPECT_THAT(line(side, "driver").text,
              HasSubstr("no NVIDIA driver; jobs run on the CPU alone (run.backend cpu)"));
  EXPECT_EQ(line(side, "gpus").text, "none");
  side = whole();
  side.driver.version = 12080;
  EXPECT_THAT(line(side, "driver").text,
              HasSubstr("CUDA 12.8, too old: this build needs CUDA 13.0; update it"));
  EXPECT_THAT(line(side, "driver").value.at("error").get<std::string>(), HasSubstr("too old"));
}

TEST(DoctorGpu, OfACpuBuildIsOneLine) {
  GpuSide side;
  ASSERT_EQ(gpu_lines(side).size(), 1u);
  EXPECT_EQ(gpu_lines(side)[0].text, "none: this is a CPU-only build");
  side.driver = cuda_driver(CERTKV_STAND_IN);
  EXPECT_EQ(gpu_lines(side)[0].text,
            "none: this is a CPU-only build; the preset cuda would use the 3 GPUs here");
}

TEST(DoctorGpu, IsASectionOfTheReport) {
  Args args;
  testing::internal::CaptureStdout();
  const int code = dispatch(args, {"doctor", "--json"});
  std::fflush(stdout);
  const auto gpu = nlohmann::json::parse(testing::internal::GetCapturedStdout()).at("gpu");
  EXPECT_EQ(code, kExitDone);
  if (!CERTKV_CUDA_BUILD) {
    EXPECT_EQ(gpu.dump(), R"({"backend":"none"})");
    return;
  }
  EXPECT_FALSE(gpu.at("backend").at("architectures").empty());
  EXPECT_THAT(gpu.at("backend").at("architectures").at(0).get<std::string>(),
              testing::MatchesRegex("sm_[0-9]+"));
  for (const char* name : {"driver", "gpus", "cublaslt", "cudnn", "nccl"}) {
    EXPECT_TRUE(gpu.contains(name)) << name;
  }
}

}  // namespace
}  // namespace certkv
