#include "kernels/cuda/shared_library.h"

#include <dlfcn.h>

#include "kernels/base/error.h"

namespace certkv::cuda {
namespace {

std::string linker_error() {
  const char* text = dlerror();
  return text == nullptr ? "no reason given" : text;
}

}  // namespace

SharedLibrary::SharedLibrary(std::string product, const std::string& purpose,
                             std::span<const std::string> sonames)
    : product_(std::move(product)) {
  std::string tried;
  for (const std::string& name : sonames) {
    handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) {
      soname_ = name;
      return;
    }
    tried += fmt::format("{}{} ({})", tried.empty() ? "" : "; ", name, linker_error());
  }
  CERTKV_THROW(DeviceError,
               "{} is needed for {} and cannot be loaded: {}. Install it, or name its folder in "
               "LD_LIBRARY_PATH",
               product_, purpose, tried);
}

void* SharedLibrary::find_symbol(const char* name) const {
  (void)dlerror();
  void* symbol = dlsym(handle_, name);
  CERTKV_EXPECT(symbol != nullptr, DeviceError,
                "{} ({}) has no function {}: {}. Install a version that fits this build", product_,
                soname_, name, linker_error());
  return symbol;
}

}  // namespace certkv::cuda
