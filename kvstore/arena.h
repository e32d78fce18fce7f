// The memory of the originals: one anonymous shared file, mapped by the store and by every rank.
//
// All of it is allocated when it is made, so lack of memory is an error at that moment and not a
// SIGBUS later. It is sealed against growing and shrinking, so a mapping stays valid whatever the
// other processes do. It has no name: when the last process is gone, nothing is left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "kvstore/block.h"

namespace certkv {

// Memory that can still be had: of the machine and of the control group this process lives in.
struct HostMemory {
  uint64_t available_bytes = 0;
  uint64_t limit_bytes = 0;    // whichever of the two is smaller, in all
  bool group_limited = false;  // the control group is what limits
};
HostMemory host_memory();

class Arena {
 public:
  // `progress` is called after every stretch that was allocated (large arenas take seconds), with
  // the bytes so far; it may throw. Throws OutOfMemory: how much was asked, how much is there, what
  // to do. REQUIRES boot_nonce != 0. `bytes` is rounded up to a granule.
  static Arena create(uint64_t bytes, uint64_t boot_nonce,
                      const std::function<void(uint64_t)>& progress = {});

  // Maps an arena that another process made. Takes `fd` over. The header is checked against what
  // the store said; CommError on any difference, and where the file is not sealed.
  static Arena map(int fd, uint64_t bytes, uint64_t boot_nonce);

  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  int fd() const { return fd_; }
  uint64_t bytes() const { return bytes_; }
  uint64_t data_bytes() const { return bytes_ - kArenaDataOffset; }

  // Checked access to the part that holds extents: Corrupt unless [offset, offset + length) lies in
  // it and offset is a multiple of 64.
  std::byte* at(uint64_t offset, uint64_t length) const;

  void stamp_progress();  // store only
  uint64_t progress() const;

  // Of ArenaHeader. THREADS: safe.
  struct Replication {
    uint64_t lag_bytes = 0, limit_bytes = 0;
  };
  void set_replication(Replication r);
  Replication replication() const;

 private:
  Arena(int fd, std::byte* base, uint64_t bytes) : fd_(fd), base_(base), bytes_(bytes) {}
  void drop() noexcept;
  int fd_ = -1;
  std::byte* base_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace certkv
