// A point on the monotonic clock that a wait may not pass. Sanitizer builds wait longer.
#pragma once

#include <chrono>

namespace certkv {

#if defined(CERTKV_SANITIZED)
inline constexpr int kDeadlineFactor = 10;
#else
inline constexpr int kDeadlineFactor = 1;
#endif

class Deadline {
 public:
  using Clock = std::chrono::steady_clock;
  static Deadline after(std::chrono::milliseconds d) {
    return Deadline(Clock::now() + d * kDeadlineFactor);
  }
  static Deadline at(Clock::time_point at) { return Deadline(at); }
  static Deadline never() { return Deadline(Clock::time_point::max()); }
  bool passed() const { return Clock::now() >= at_; }
  Clock::time_point at() const { return at_; }
  std::chrono::milliseconds left() const {
    const auto now = Clock::now();
    if (now >= at_) return std::chrono::milliseconds(0);
    return std::chrono::duration_cast<std::chrono::milliseconds>(at_ - now);
  }

 private:
  explicit Deadline(Clock::time_point at) : at_(at) {}
  Clock::time_point at_;
};

}  // namespace certkv
