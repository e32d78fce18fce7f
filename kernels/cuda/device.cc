#include "kernels/cuda/device.h"

#include "kernels/base/log.h"

namespace certkv::cuda {

void Device::settle(Deadline deadline) noexcept {
  const auto logged = [](const auto& wait) {
    try {
      wait();
    } catch (const std::exception& e) {
      log_line(LogLevel::Error, e.what());
    }
  };
  logged([&] { await_fetches(deadline); });
  logged([&] { synchronize(deadline); });
}

}  // namespace certkv::cuda
