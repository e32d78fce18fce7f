#include "launcher/machine.h"

#include <fmt/core.h>
#include <hwloc.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <fstream>
#include <limits>
#include <sstream>

#include "parallel/topology.h"
#include "runtime/host_memory.h"

namespace certkv {

namespace {

std::string read_all(const char* path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

uint64_t soft_limit(int resource) {
  rlimit limit{};
  if (getrlimit(__rlimit_resource_t(resource), &limit) != 0) return 0;
  return limit.rlim_cur == RLIM_INFINITY ? std::numeric_limits<uint64_t>::max() : limit.rlim_cur;
}

// Caches of the highest level that there is. hwloc counts only those that this process may use.
uint64_t last_cache() {
  hwloc_topology_t topology;
  if (hwloc_topology_init(&topology) != 0) return 0;
  uint64_t bytes = 0;
  if (hwloc_topology_load(topology) == 0) {
    for (const hwloc_obj_type_t level : {HWLOC_OBJ_L4CACHE, HWLOC_OBJ_L3CACHE, HWLOC_OBJ_L2CACHE}) {
      hwloc_obj_t cache = nullptr;
      while ((cache = hwloc_get_next_obj_by_type(topology, level, cache)) != nullptr) {
        bytes += cache->attr->cache.size;
      }
      if (bytes > 0) break;
    }
  }
  hwloc_topology_destroy(topology);
  return bytes;
}

}  // namespace

std::string cpuinfo_value(const std::string& cpuinfo, const std::string& name) {
  std::istringstream lines(cpuinfo);
  std::string line;
  while (std::getline(lines, line)) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t end = line.find_last_not_of(" \t", colon == 0 ? 0 : colon - 1);
    if (line.substr(0, end + 1) != name) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

std::vector<std::string> cpu_features(const std::string& cpuinfo) {
  constexpr struct {
    const char *flag, *name;
  } kKnown[] = {{"fma", "FMA"},
                {"f16c", "F16C"},
                {"avx2", "AVX2"},
                {"avx_vnni", "AVX-VNNI"},
                {"avx512f", "AVX-512F"},
                {"avx512bw", "AVX-512BW"},
                {"avx512vl", "AVX-512VL"},
                {"avx512_vnni", "AVX-512-VNNI"},
                {"avx512_bf16", "AVX-512-BF16"},
                {"amx_int8", "AMX-INT8"},
                {"amx_bf16", "AMX-BF16"},
                {"asimd", "NEON"},
                {"sve", "SVE"},
                {"i8mm", "I8MM"}};
  // "Features" is what the line is called on ARM.
  const std::string flags =
      " " + cpuinfo_value(cpuinfo, "flags") + " " + cpuinfo_value(cpuinfo, "Features") + " ";
  std::vector<std::string> found;
  for (const auto& known : kKnown) {
    if (flags.find(fmt::format(" {} ", known.flag)) != std::string::npos) {
      found.emplace_back(known.name);
    }
  }
  return found;
}

Machine inspect_machine() {
  Machine m;
  m.host = host_name();
  utsname system{};
  if (uname(&system) == 0) {
    m.system = fmt::format("{} {} {}", system.sysname, system.release, system.machine);
  }
  const std::string cpuinfo = read_all("/proc/cpuinfo");
  m.cpu = cpuinfo_value(cpuinfo, "model name");
  m.features = cpu_features(cpuinfo);
  m.cores_online = int(sysconf(_SC_NPROCESSORS_ONLN));
  m.cores_usable = usable_cores();
  m.last_cache_bytes = last_cache();
  m.memory_bytes = uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE));
  m.memory_available_bytes = available_memory_bytes();
  struct statvfs shm {};
  if (statvfs("/dev/shm", &shm) == 0) {
    m.shm_bytes = uint64_t(shm.f_blocks) * shm.f_frsize;
    m.shm_free_bytes = uint64_t(shm.f_bavail) * shm.f_frsize;
  }
  m.memlock_bytes = soft_limit(RLIMIT_MEMLOCK);
  m.open_files = soft_limit(RLIMIT_NOFILE);
  m.address_space_bytes = soft_limit(RLIMIT_AS);
  return m;
}

}  // namespace certkv
