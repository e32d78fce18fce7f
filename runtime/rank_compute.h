// What a rank computes with: its cache and its forward pass, on the CPU or on a device.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "kernels/base/thread_pool.h"
#include "parallel/shard.h"
#include "runtime/audit/log.h"
#include "runtime/certified_engine.h"
#include "runtime/device/device_backend.h"
#include "runtime/device/device_group.h"
#include "runtime/forward_pass.h"
#include "runtime/kv_attention.h"
#include "runtime/sequence_cache.h"

namespace certkv {

struct RankCompute {
  DeviceBackend device;                       // empty on the CPU
  std::unique_ptr<DeviceGroup> device_group;  // T > 1
  std::unique_ptr<AuditLog> audit;
  std::unique_ptr<SequenceCache> cache;
  std::unique_ptr<ForwardPass> forward;

  bool on_device() const { return device.device != nullptr; }
  // Under run.tier1_memory auto. UNITS: bytes
  uint64_t tier1_memory(int local_ranks) const;
  EngineNeed need(const JobOptions& options, const ModelConfig& config, ShardRange heads,
                  int tensor, int64_t prompt_tokens, int64_t max_tokens,
                  std::span<const Policy> policies) const;
};

// By run.backend. `parts` and `pool` must outlive it. Throws InvalidArgument for what a backend
// does not support, DeviceError where no device answers.
RankCompute make_rank_compute(const JobOptions& options, const EngineParts& parts, ShardRange heads,
                              ThreadPool& pool);

}  // namespace certkv
