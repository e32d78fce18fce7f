// What this machine's memory gives to the threads of a pool: the scale that kernels are measured
// on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace certkv {

class ThreadPool;

// Two buffers that the threads of a pool copy and read in equal parts.
class MemoryBandwidth {
 public:
  // buffer_bytes: of each buffer; more than 4 times the last-level cache, or the cache is measured.
  MemoryBandwidth(size_t buffer_bytes, ThreadPool& pool);

  // Each call moves the whole buffer once. Returns bytes read + written (copies), or read, over
  // wall time. UNITS: 1e9 bytes a second
  double copy_gbps();            // the library's memcpy
  double copy_streaming_gbps();  // non-temporal stores; the same as copy_gbps where there are none
  double read_gbps();            // a sum over one buffer

  size_t buffer_bytes() const { return words_ * 8; }

 private:
  template <typename Body>
  double measure(double moved_bytes, const Body& body);

  ThreadPool& pool_;
  size_t words_;
  std::unique_ptr<uint64_t[], void (*)(void*)> from_, to_;
  uint64_t sink_ = 0;
};

}  // namespace certkv
