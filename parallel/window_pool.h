// Memory for messages under way: one slab, allocated and made known to the network once, cut into
// windows that are lent out.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <utility>

namespace certkv {

class WindowPool;

// A lent piece of the slab, which outlives it. Dropping it gives it back. THREADS: one at a time.
class Window {
 public:
  Window() = default;
  Window(Window&& other) noexcept
      : slab_(std::move(other.slab_)), bytes_(std::exchange(other.bytes_, {})) {}
  Window& operator=(Window&& other) noexcept;
  ~Window() { reset(); }

  explicit operator bool() const { return slab_ != nullptr; }
  std::span<std::byte> bytes() const { return bytes_; }
  void reset() noexcept;

 private:
  friend class WindowPool;
  struct Slab;
  std::shared_ptr<Slab> slab_;
  std::span<std::byte> bytes_;
};

// THREADS: safe. A copy is the same pool.
class WindowPool {
 public:
  // Throws OutOfMemory. Pages are touched when they are first used.
  explicit WindowPool(size_t bytes);

  // The smallest hole that fits; empty where there is none. Zero bytes take a granule as well, so
  // that every message of a call is accounted for.
  Window take(size_t bytes) const;
  std::span<std::byte> slab() const;
  size_t lent_bytes() const;

 private:
  std::shared_ptr<Window::Slab> slab_;
};

}  // namespace certkv
