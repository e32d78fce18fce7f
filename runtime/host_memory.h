// How much memory this process may still take on this host.
#pragma once

#include <cstdint>
#include <filesystem>

namespace certkv {

// The least of MemAvailable and, along this process's control groups (version 1 and 2), limit minus
// use, page cache that can be dropped counted as free. 0 where /proc/meminfo cannot be read.
// UNITS: bytes
uint64_t available_memory_bytes();

// The same with /proc and /sys/fs/cgroup elsewhere (for tests).
uint64_t available_memory_bytes(const std::filesystem::path& proc,
                                const std::filesystem::path& cgroup);

}  // namespace certkv
