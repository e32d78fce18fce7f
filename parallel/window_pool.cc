#include "parallel/window_pool.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr size_t kGranule = 4096;

size_t granules(size_t bytes) {
  return bytes == 0 ? kGranule : (bytes + kGranule - 1) / kGranule * kGranule;
}

}  // namespace

struct Window::Slab {
  explicit Slab(size_t n) : bytes(granules(n)) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CERTKV_EXPECT(p != MAP_FAILED, OutOfMemory, "{} bytes of windows for messages: {}", bytes,
                  std::strerror(errno));
    base = static_cast<std::byte*>(p);
    holes[0] = bytes;
  }
  ~Slab() { munmap(base, bytes); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  void give_back(size_t offset, size_t n) {
    const std::lock_guard lock(mutex);
    lent -= n;
    auto at = holes.emplace(offset, n).first;
    if (const auto next = std::next(at); next != holes.end() && offset + n == next->first) {
      at->second += next->second;
      holes.erase(next);
    }
    if (at == holes.begin()) return;
    const auto before = std::prev(at);
    if (before->first + before->second != at->first) return;
    before->second += at->second;
    holes.erase(at);
  }

  size_t bytes;
  std::byte* base = nullptr;
  std::mutex mutex;
  std::map<size_t, size_t> holes;  // offset -> bytes, coalesced
  size_t lent = 0;
};

Window& Window::operator=(Window&& other) noexcept {
  if (this == &other) return *this;
  reset();
  slab_ = std::move(other.slab_);
  bytes_ = std::exchange(other.bytes_, {});
  return *this;
}

void Window::reset() noexcept {
  if (slab_ == nullptr) return;
  slab_->give_back(size_t(bytes_.data() - slab_->base), granules(bytes_.size()));
  slab_.reset();
  bytes_ = {};
}

WindowPool::WindowPool(size_t bytes) : slab_(std::make_shared<Window::Slab>(bytes)) {}

Window WindowPool::take(size_t bytes) const {
  Window::Slab& s = *slab_;
  Window w;
  if (bytes > s.bytes) return w;
  const size_t n = granules(bytes);
  const std::lock_guard lock(s.mutex);
  auto best = s.holes.end();
  for (auto it = s.holes.begin(); it != s.holes.end(); ++it) {
    if (it->second >= n && (best == s.holes.end() || it->second < best->second)) best = it;
  }
  if (best == s.holes.end()) return w;
  const size_t offset = best->first, rest = best->second - n;
  s.holes.erase(best);
  if (rest > 0) s.holes[offset + n] = rest;
  s.lent += n;
  w.slab_ = slab_;
  w.bytes_ = {s.base + offset, bytes};
  return w;
}

std::span<std::byte> WindowPool::slab() const {
  return {slab_->base, slab_->bytes};
}

size_t WindowPool::lent_bytes() const {
  const std::lock_guard lock(slab_->mutex);
  return slab_->lent;
}

}  // namespace certkv
