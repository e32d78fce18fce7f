#include "parallel/installed_libraries.h"

#include <dlfcn.h>
#include <fmt/core.h>
#include <link.h>
#include <mpi.h>
#include <ucp/api/ucp.h>
#include <uct/api/uct.h>

#include <array>
#include <fstream>

#include "parallel/nccl_api.h"

namespace certkv {

// ---- MPI and UCX --------------------------------------------------------------------------------

std::string mpi_library_version() {
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> text{};
  int length = 0;
  // One of the few calls that MPI allows before MPI_Init.
  if (MPI_Get_library_version(text.data(), &length) != MPI_SUCCESS) return "unknown";
  const std::string all(text.data(), size_t(length));
  return all.substr(0, all.find_first_of(",\n"));
}

std::string ucx_library_version() {
  unsigned major = 0, minor = 0, release = 0;
  ucp_get_version(&major, &minor, &release);
  return fmt::format("{}.{}.{}", major, minor, release);
}

namespace {

void list_transports(uct_component_h component, const char* resource,
                     std::vector<UcxTransport>* found) {
  uct_md_config_t* config = nullptr;
  if (uct_md_config_read(component, nullptr, nullptr, &config) != UCS_OK) return;
  uct_md_h domain = nullptr;
  const ucs_status_t opened = uct_md_open(component, resource, config, &domain);
  uct_config_release(config);
  if (opened != UCS_OK) return;
  uct_tl_resource_desc_t* transports = nullptr;
  unsigned count = 0;
  if (uct_md_query_tl_resources(domain, &transports, &count) == UCS_OK) {
    for (unsigned i = 0; i < count; ++i) {
      found->push_back({transports[i].tl_name, transports[i].dev_name});
    }
    uct_release_tl_resource_list(transports);
  }
  uct_md_close(domain);
}

}  // namespace

std::vector<UcxTransport> ucx_transports() {
  std::vector<UcxTransport> found;
  uct_component_h* components = nullptr;
  unsigned count = 0;
  if (uct_query_components(&components, &count) != UCS_OK) return found;
  for (unsigned i = 0; i < count; ++i) {
    uct_component_attr_t attributes{};
    attributes.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCE_COUNT;
    if (uct_component_query(components[i], &attributes) != UCS_OK) continue;
    std::vector<uct_md_resource_desc_t> resources(attributes.md_resource_count);
    attributes.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCES;
    attributes.md_resources = resources.data();
    if (uct_component_query(components[i], &attributes) != UCS_OK) continue;
    for (const uct_md_resource_desc_t& resource : resources) {
      list_transports(components[i], resource.md_name, &found);
    }
  }
  uct_release_component_list(components);
  return found;
}

// ---- CUDA, cuBLASLt, cuDNN and NCCL -------------------------------------------------------------

namespace {

// Never unloaded: these libraries start threads of their own.
void* load(const std::string& soname) {
  (void)dlerror();
  return dlopen(soname.c_str(), RTLD_LAZY | RTLD_LOCAL | RTLD_NODELETE);
}

template <typename Function>
Function* symbol(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

// From the driver's C interface, which is stable; CUresult and CUdevice are ints.
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // of CUdevice_attribute

std::string first_word_of(const char* path) {
  std::string word;
  std::ifstream(path) >> word;
  return word;
}

std::string vendor_version(VendorLibrary which, void* library) {
  switch (which) {
    case VendorLibrary::CublasLt:
      if (auto* get = symbol<size_t()>(library, "cublasLtGetVersion"); get != nullptr) {
        const size_t v = get();  // 130100: 13.1.0
        return fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
      }
      break;
    case VendorLibrary::Cudnn:
      if (auto* get = symbol<size_t()>(library, "cudnnGetVersion"); get != nullptr) {
        const size_t v = get();  // 91301: 9.13.1, since version 9
        return fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
      }
      break;
    case VendorLibrary::Nccl:
      if (auto* get = symbol<int(int*)>(library, "ncclGetVersion"); get != nullptr) {
        int v = 0;
        if (get(&v) == 0) return nccl_version_text(v);
      }
      break;
  }
  return "unknown";
}

}  // namespace

CudaDriver cuda_driver(const std::string& soname) {
  CudaDriver driver;
  driver.kernel = first_word_of("/sys/module/nvidia/version");
  void* library = load(soname);
  if (library == nullptr) {
    driver.error = fmt::format("{} was not found: no NVIDIA driver", soname);
    return driver;
  }
  driver.loaded = true;
  auto* init = symbol<int(unsigned)>(library, "cuInit");
  auto* version = symbol<int(int*)>(library, "cuDriverGetVersion");
  auto* device_count = symbol<int(int*)>(library, "cuDeviceGetCount");
  auto* device_get = symbol<int(int*, int)>(library, "cuDeviceGet");
  auto* device_name = symbol<int(char*, int, int)>(library, "cuDeviceGetName");
  auto* device_memory = symbol<int(size_t*, int)>(library, "cuDeviceTotalMem_v2");
  auto* attribute = symbol<int(int*, int, int)>(library, "cuDeviceGetAttribute");
  if (init == nullptr || version == nullptr || device_count == nullptr || device_get == nullptr ||
      device_name == nullptr || device_memory == nullptr || attribute == nullptr) {
    driver.error = fmt::format("{} lacks functions that every driver has", soname);
    return driver;
  }
  if (version(&driver.version) != 0) driver.version = 0;
  if (const int code = init(0); code != 0) {
    driver.error = fmt::format("cuInit failed with code {}: no GPU answers", code);
    return driver;
  }
  int count = 0;
  if (const int code = device_count(&count); code != 0) {
    driver.error = fmt::format("cuDeviceGetCount failed with code {}", code);
    return driver;
  }
  for (int i = 0; i < count; ++i) {
    int device = 0, major = 0, minor = 0;
    std::array<char, 256> name{};
    size_t bytes = 0;
    const bool good = device_get(&device, i) == 0 &&
                      device_name(name.data(), int(name.size()) - 1, device) == 0 &&
                      device_memory(&bytes, device) == 0 &&
                      attribute(&major, kCapabilityMajor, device) == 0 &&
                      attribute(&minor, kCapabilityMinor, device) == 0;
    driver.gpus.push_back(
        {good ? name.data() : "does not answer", bytes, good ? 10 * major + minor : 0});
  }
  return driver;
}

FoundLibrary find_library(VendorLibrary which, const std::string& soname) {
  FoundLibrary found;
  void* library = load(soname);
  if (library == nullptr) {
    const char* text = dlerror();
    found.error = text == nullptr ? "not found" : text;
    return found;
  }
  const link_map* entry = nullptr;
  found.path = dlinfo(library, RTLD_DI_LINKMAP, &entry) == 0 ? entry->l_name : soname;
  found.version = vendor_version(which, library);
  return found;
}

}  // namespace certkv
