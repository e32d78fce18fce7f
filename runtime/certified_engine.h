// The Engine of runtime/engine.h over the certified cache: one per rank of a tensor-parallel group.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "kvstore/content_owner.h"
#include "runtime/audit/log.h"
#include "runtime/device/device_backend.h"
#include "runtime/engine.h"

namespace certkv {

class Communicator;
class StoreClient;
class Tokenizer;
struct ModelConfig;
struct Weights;

struct EngineParts {
  std::shared_ptr<const ModelConfig> config;
  std::shared_ptr<const Weights> weights;  // this rank's shard
  std::shared_ptr<const Tokenizer> tokenizer;
  std::vector<int32_t> stop_ids;  // that end an answer, besides the model's EOS
  Communicator* group = nullptr;  // tensor-parallel group; must outlive the engine
  // Another communicator of the group, for NCCL to be laid over; asked for on devices, T > 1,
  // twice, by all ranks of the job at its start.
  std::function<std::unique_ptr<Communicator>()> device_control;
  std::shared_ptr<StoreClient> store;  // attached
  // What names the prompts' originals, for them to be shared; none: they are not.
  std::optional<ContentScope> scope;
  int threads = 1;
  int local_ranks = 1;              // that share this node's memory
  int local_rank = 0;               // among them; picks the device
  std::optional<AuditSetup> audit;  // where head-steps are audited
  // Makes the device; empty: make_device_backend.
  std::function<DeviceBackend(const std::string& backend, int ordinal)> make_device;
};

// Tokens of prompt + answer that a request may have: model.max_len, 0 meaning the model's own
// limit. ERRORS: InvalidArgument for one above it.
int64_t engine_token_limit(const JobOptions& options, const ModelConfig& config);

// DType of the originals: model.dtype, or the folder's (BF16 where that is F32).
// Throws InvalidArgument.
DType originals_dtype(const JobOptions& options, const ModelConfig& config);

// What a rank takes for a given request shape. UNITS: bytes
struct EngineNeed {
  uint64_t tier1 = 0, scratch = 0, arena = 0, prefill = 0;
  // On a device, where prefill counts its memory too: tier 1 of the prompt alone, which prefill
  // finds taken; rung 3's staging, whole and at least; the host's memory.
  uint64_t prompt = 0, staging = 0, least_staging = 0, host = 0;
  bool on_device = false;

  uint64_t held() const { return tier1 + scratch + staging; }  // while it decodes
  // The most at any time, of what run.tier1_memory limits: with all of the staging, and at least.
  uint64_t peak() const { return most(staging); }
  uint64_t least() const { return most(least_staging); }

 private:
  uint64_t most(uint64_t staged) const {
    const uint64_t decoding = tier1 + scratch + staged;
    return on_device && prompt + prefill > decoding ? prompt + prefill : decoding;
  }
};
EngineNeed engine_need(const JobOptions& options, const ModelConfig& config, int tensor,
                       int64_t prompt_tokens, int64_t max_tokens, int forks);

std::unique_ptr<Engine> make_engine(const JobOptions& options, EngineParts parts);

}  // namespace certkv
