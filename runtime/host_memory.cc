#include "runtime/host_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

namespace certkv {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

std::optional<uint64_t> number_in(const fs::path& file) {
  std::ifstream in(file);
  uint64_t n = 0;
  if (in >> n) return n;
  return std::nullopt;
}

// The number after `key` in lines of "key number" or "key: number kB".
std::optional<uint64_t> number_after(const fs::path& file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string first;
    uint64_t n = 0;
    if (words >> first >> n && first == key) return n;
  }
  return std::nullopt;
}

// Room in one control group; "max" and absent files mean no limit.
uint64_t room(const fs::path& group, const char* limit_file, const char* use_file,
              const char* inactive_key) {
  const auto limit = number_in(group / limit_file), use = number_in(group / use_file);
  if (!limit || !use) return kNoLimit;
  const uint64_t droppable = number_after(group / "memory.stat", inactive_key).value_or(0);
  const uint64_t held = *use > droppable ? *use - droppable : 0;
  return *limit > held ? *limit - held : 0;
}

// The least room of the group and of all groups above it.
uint64_t least_room(const fs::path& root, const std::string& group, const char* limit_file,
                    const char* use_file, const char* inactive_key) {
  uint64_t least = room(root, limit_file, use_file, inactive_key);
  fs::path at = root;
  for (const fs::path& part : fs::path(group).relative_path()) {
    if (part == "..") return least;  // the group lies outside what this container sees
    at /= part;
    least = std::min(least, room(at, limit_file, use_file, inactive_key));
  }
  return least;
}

}  // namespace

uint64_t available_memory_bytes() { return available_memory_bytes("/proc", "/sys/fs/cgroup"); }

uint64_t available_memory_bytes(const fs::path& proc, const fs::path& cgroup) {
  uint64_t available = number_after(proc / "meminfo", "MemAvailable:").value_or(0) * 1024;
  std::ifstream groups(proc / "self" / "cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path", "5:memory:/path"
    const size_t a = line.find(':'), b = a == std::string::npos ? a : line.find(':', a + 1);
    if (b == std::string::npos) continue;
    const std::string controllers = "," + line.substr(a + 1, b - a - 1) + ",";
    const std::string group = line.substr(b + 1);
    if (controllers == ",,") {
      available = std::min(available, least_room(cgroup, group, "memory.max", "memory.current",
                                                 "inactive_file"));
    } else if (controllers.find(",memory,") != std::string::npos) {
      available = std::min(available,
                           least_room(cgroup / "memory", group, "memory.limit_in_bytes",
                                      "memory.usage_in_bytes", "total_inactive_file"));
    }
  }
  return available;
}

}  // namespace certkv
