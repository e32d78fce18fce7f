#include "kvstore/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "kvstore/control.h"

namespace certkv {
namespace {

constexpr uint64_t kStretch = uint64_t(256) << 20;  // allocated between two reports of progress
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// The number in a file of one number; `otherwise` where it cannot be read ("max" included).
uint64_t number_in(const std::string& path, uint64_t otherwise) {
  std::ifstream in(path);
  uint64_t x = 0;
  return in >> x ? x : otherwise;
}

// The number after `key` in a file of lines "key number ..."; 0 where there is none.
uint64_t number_after(const std::string& path, const std::string& key) {
  std::ifstream in(path);
  std::string word;
  uint64_t x = 0;
  while (in >> word) {
    if (word == key && in >> x) return x;
    in.clear();
  }
  return 0;
}

// Path of this process's control group in a hierarchy: "" is cgroup v2, "memory" the v1 controller.
std::string group_path(const std::string& controller) {
  std::ifstream in("/proc/self/cgroup");
  std::string line;
  while (std::getline(in, line)) {
    const size_t a = line.find(':'), b = a == line.npos ? a : line.find(':', a + 1);
    if (b == line.npos) continue;
    if (line.substr(a + 1, b - a - 1) == controller) return line.substr(b + 1);
  }
  return {};
}

struct GroupMemory {
  uint64_t limit = UINT64_MAX, used = 0;
};

// Containers show their own group at the root of the hierarchy, so the root is looked at as well.
void tighten(GroupMemory& g, const std::string& folder, const char* limit, const char* used,
             const char* reclaimable) {
  const uint64_t l = number_in(folder + "/" + limit, UINT64_MAX);
  if (l >= g.limit) return;
  const uint64_t u = number_in(folder + "/" + used, 0);
  const uint64_t r = number_after(folder + "/memory.stat", reclaimable);
  g.limit = l;
  g.used = u - std::min(u, r);
}

GroupMemory group_memory() {
  GroupMemory g;
  for (const std::string& path : {std::string(), group_path("")}) {
    tighten(g, "/sys/fs/cgroup" + path, "memory.max", "memory.current", "inactive_file");
  }
  for (const std::string& path : {std::string(), group_path("memory")}) {
    tighten(g, "/sys/fs/cgroup/memory" + path, "memory.limit_in_bytes", "memory.usage_in_bytes",
            "total_inactive_file");
  }
  return g;
}

std::string mebibytes(uint64_t bytes) {
  return fmt::format("{:.1f} MiB", double(bytes) / double(1 << 20));
}

[[noreturn]] void throw_no_memory(uint64_t asked, uint64_t got, int error) {
  const HostMemory memory = host_memory();
  rlimit file_limit{};
  getrlimit(RLIMIT_FSIZE, &file_limit);
  const std::string limit = file_limit.rlim_cur == RLIM_INFINITY
                                ? std::string("no limit")
                                : mebibytes(uint64_t(file_limit.rlim_cur));
  CERTKV_THROW(OutOfMemory,
               "the store's arena needs {} of shared memory, but {} could be had ({}). Available "
               "memory: {}{}; file size limit (ulimit -f): {}. Lower store.arena, run fewer or "
               "shorter requests at once, or give the node (or its container or job) more memory",
               mebibytes(asked), mebibytes(got), std::strerror(error),
               mebibytes(memory.available_bytes),
               memory.group_limited ? ", limited by the control group" : "", limit);
}

void fill_header(std::byte* base, uint64_t bytes, uint64_t boot_nonce) {
  ArenaHeader header;
  header.magic = kArenaMagic;
  header.format = kFormatVersion;
  header.header_bytes = uint16_t(sizeof(ArenaHeader));
  header.uid = getuid();
  header.boot_nonce = boot_nonce;
  header.arena_bytes = bytes;
  header.data_offset = kArenaDataOffset;
  header.store_pid = uint64_t(getpid());
  header.checksum = arena_checksum(header);
  std::memcpy(base, &header, sizeof header);
}

}  // namespace

HostMemory host_memory() {
  HostMemory m;
  m.limit_bytes = number_after("/proc/meminfo", "MemTotal:") * 1024;
  m.available_bytes = number_after("/proc/meminfo", "MemAvailable:") * 1024;
  const GroupMemory g = group_memory();
  const uint64_t group_left = g.limit - std::min(g.limit, g.used);
  m.group_limited = group_left < m.available_bytes;
  m.limit_bytes = std::min(m.limit_bytes, g.limit);
  m.available_bytes = std::min(m.available_bytes, group_left);
  return m;
}

Arena Arena::create(uint64_t bytes, uint64_t boot_nonce,
                    const std::function<void(uint64_t)>& progress) {
  CERTKV_EXPECT(boot_nonce != 0, InvalidArgument, "the boot nonce of an arena must not be 0");
  CERTKV_EXPECT(bytes > kArenaDataOffset && bytes < uint64_t(1) << 62, InvalidArgument,
                "store.arena of {} bytes: more than {} are needed", bytes, kArenaDataOffset);
  bytes = (bytes + kArenaGranule - 1) / kArenaGranule * kArenaGranule;

  // Asked beforehand, because a control group answers an overdraft not with an error but by
  // killing.
  const HostMemory memory = host_memory();
  if (memory.available_bytes > 0 && bytes > memory.available_bytes) {
    throw_no_memory(bytes, memory.available_bytes, ENOMEM);
  }
  // The kernel also sends SIGXFSZ when this limit is met, so it is not left to the kernel.
  rlimit file_limit{};
  if (getrlimit(RLIMIT_FSIZE, &file_limit) == 0 && file_limit.rlim_cur != RLIM_INFINITY &&
      bytes > file_limit.rlim_cur) {
    throw_no_memory(bytes, file_limit.rlim_cur, EFBIG);
  }

  const int fd = memfd_create("certkv-arena", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CERTKV_EXPECT(fd >= 0, OutOfMemory, "memfd_create: {}", std::strerror(errno));
  Arena arena(fd, nullptr, 0);  // owns fd from here on
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t step = std::min(kStretch, bytes - done);
    CERTKV_FAILPOINT(arena_allocate);
    int error;
    do {
      error = posix_fallocate(fd, off_t(done), off_t(step));
    } while (error == EINTR);
    if (error != 0) throw_no_memory(bytes, done, error);
    done += step;
    if (progress) progress(done);
  }
  CERTKV_EXPECT(fcntl(fd, F_ADD_SEALS, kSeals) == 0, OutOfMemory, "sealing the arena: {}",
                std::strerror(errno));
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CERTKV_EXPECT(base != MAP_FAILED, OutOfMemory, "mapping an arena of {}: {}", mebibytes(bytes),
                std::strerror(errno));
  arena.base_ = static_cast<std::byte*>(base);
  arena.bytes_ = bytes;
  fill_header(arena.base_, bytes, boot_nonce);
  return arena;
}

Arena Arena::map(int fd, uint64_t bytes, uint64_t boot_nonce) {
  Arena arena(fd, nullptr, 0);
  CERTKV_FAILPOINT(arena_map);
  struct stat st {};
  CERTKV_EXPECT(fstat(fd, &st) == 0, CommError, "the store's arena: {}", std::strerror(errno));
  const int seals = fcntl(fd, F_GET_SEALS);
  CERTKV_EXPECT(seals >= 0 && (seals & kSeals) == kSeals, CommError,
                "the store's arena is not sealed against resizing: this is no certkv store");
  CERTKV_EXPECT(
      bytes > kArenaDataOffset && bytes % kArenaGranule == 0 && uint64_t(st.st_size) == bytes,
      CommError, "the store's arena has {} bytes, but the store said {}", st.st_size, bytes);
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  CERTKV_EXPECT(base != MAP_FAILED, OutOfMemory,
                "mapping the store's arena of {}: {} (ulimit -v, or vm.max_map_count)",
                mebibytes(bytes), std::strerror(errno));
  arena.base_ = static_cast<std::byte*>(base);
  arena.bytes_ = bytes;
  ArenaHeader header;
  std::memcpy(static_cast<void*>(&header), base, offsetof(ArenaHeader, progress));
  CERTKV_FAILPOINT_BYTES(arena_header, &header, offsetof(ArenaHeader, progress));
  CERTKV_EXPECT(header.magic == kArenaMagic && header.format == kFormatVersion &&
                    header.header_bytes == sizeof(ArenaHeader) && header.uid == getuid() &&
                    header.boot_nonce == boot_nonce && header.arena_bytes == bytes &&
                    header.data_offset == kArenaDataOffset && header.reserved == 0 &&
                    header.checksum == arena_checksum(header),
                CommError,
                "the header of the store's arena is not what this version writes: are store and "
                "ranks of the same build?");
  return arena;
}

Arena::Arena(Arena&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      base_(std::exchange(other.base_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  if (this != &other) {
    drop();
    fd_ = std::exchange(other.fd_, -1);
    base_ = std::exchange(other.base_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

Arena::~Arena() {
  drop();
}

void Arena::drop() noexcept {
  if (base_ != nullptr) munmap(base_, bytes_);
  if (fd_ >= 0) close(fd_);
}

std::byte* Arena::at(uint64_t offset, uint64_t length) const {
  CERTKV_EXPECT(offset >= kArenaDataOffset && offset <= bytes_ && length <= bytes_ - offset &&
                    offset % kBlockAlignment == 0,
                Corrupt, "an extent at {} of {} bytes does not lie in the arena of {} bytes",
                offset, length, bytes_);
  return base_ + offset;
}

void Arena::stamp_progress() {
  std::atomic_ref<uint64_t>(reinterpret_cast<ArenaHeader*>(base_)->progress)
      .fetch_add(1, std::memory_order_relaxed);
}

void Arena::set_replication(Replication r) {
  auto& header = *reinterpret_cast<ArenaHeader*>(base_);
  std::atomic_ref<uint64_t>(header.replication_lag).store(r.lag_bytes, std::memory_order_relaxed);
  std::atomic_ref<uint64_t>(header.replication_limit)
      .store(r.limit_bytes, std::memory_order_relaxed);
}

Arena::Replication Arena::replication() const {
  auto& header = *reinterpret_cast<ArenaHeader*>(base_);
  return {
      std::atomic_ref<uint64_t>(header.replication_lag).load(std::memory_order_relaxed),
      std::atomic_ref<uint64_t>(header.replication_limit).load(std::memory_order_relaxed),
  };
}

uint64_t Arena::progress() const {
  return std::atomic_ref<uint64_t>(reinterpret_cast<ArenaHeader*>(base_)->progress)
      .load(std::memory_order_relaxed);
}

}  // namespace certkv
