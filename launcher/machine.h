// Facts about this machine, for `certkv doctor` and the manifest of a run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace certkv {

struct Machine {
  std::string host, system, cpu;      // system: kernel name, release, architecture
  std::vector<std::string> features;  // of the CPU: AVX2, AVX-512F, AVX-512-VNNI, AVX-VNNI, ...
  int cores_online = 0, cores_usable = 0;      // usable: affinity mask and control group
  uint64_t last_cache_bytes = 0;               // last-level cache in all; 0: unknown
  uint64_t memory_bytes = 0;                   // installed
  uint64_t memory_available_bytes = 0;         // this process may still take
  uint64_t shm_bytes = 0, shm_free_bytes = 0;  // /dev/shm; 0: there is none
  // Limits of this process; UINT64_MAX: unlimited.
  uint64_t memlock_bytes = 0, open_files = 0, address_space_bytes = 0;
};

Machine inspect_machine();

// Those of the known features that the `flags` line of a /proc/cpuinfo text lists.
std::vector<std::string> cpu_features(const std::string& cpuinfo);
// The value of the first line `name : value`, or "".
std::string cpuinfo_value(const std::string& cpuinfo, const std::string& name);

}  // namespace certkv
