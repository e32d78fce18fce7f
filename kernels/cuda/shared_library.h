// A vendor's library, found when it is first needed: a program that could use a GPU then starts on
// a machine without it, and says by name what is missing when a GPU is asked for.
#pragma once

#include <span>
#include <string>

namespace certkv::cuda {

class SharedLibrary {
 public:
  // Loads the first of `sonames` that the dynamic linker finds. It stays loaded until the process
  // ends. `product`: what its vendor calls it; `purpose`: what cannot be done without it. Throws
  // DeviceError: both, every soname tried and what the linker said.
  SharedLibrary(std::string product, const std::string& purpose,
                std::span<const std::string> sonames);

  const std::string& soname() const { return soname_; }
  // Throws DeviceError where the library has no such function: the library and the function.
  template <typename Function>
  void find(Function** function, const char* name) const {
    *function = reinterpret_cast<Function*>(find_symbol(name));
  }

 private:
  void* find_symbol(const char* name) const;

  std::string product_, soname_;
  void* handle_ = nullptr;
};

}  // namespace certkv::cuda
