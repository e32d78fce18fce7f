#include "runtime/rank_compute.h"

#include <chrono>

#include "kernels/base/log.h"
#include "parallel/communicator.h"
#include "runtime/byte_size.h"
#include "runtime/certified_cache.h"
#include "runtime/device/device_cache.h"
#include "runtime/device/device_transformer.h"
#include "runtime/host_memory.h"
#include "runtime/transformer.h"
#include "runtime/weights.h"

namespace certkv {
namespace {

CertifiedCacheOptions cache_options(const JobOptions& o, const ModelConfig& config) {
  return {.cache = o.cache,
          .scratch = o.scratch,
          .dtype = originals_dtype(o, config),
          .read_deadline = std::chrono::milliseconds(int64_t(o.store.deadline_seconds * 1000))};
}

AuditShape audit_shape(const EngineParts& parts, ShardRange heads, DType originals,
                       const PageFormat* format, bool device) {
  return {.layers = parts.config->layers,
          .query_heads = parts.config->heads,
          .kv_heads = parts.config->kv_heads,
          .heads = heads,
          .dtype = originals,
          .format = format,
          .device = device};
}

DeviceTransformerOptions transformer_options(const JobOptions& o, const ModelConfig& config) {
  return {.originals = originals_dtype(o, config),
          .weights = config.dtype,
          .int8 = weight_format(o.model.quantization) == WeightFormat::Int8,
          .max_batch = size_t(o.run.max_batch),
          .max_tokens = engine_token_limit(o, config)};
}

// Before anything is uploaded: all that will be asked for, and what there is.
void check_room(const EngineParts& parts, const DeviceTransformerOptions& options,
                const cuda::Device& device) {
  const uint64_t weights = DeviceWeights::bytes(*parts.config, *parts.weights, options.weights);
  const uint64_t step = DeviceTransformer::step_bytes(*parts.config, parts.group->size(), options);
  const uint64_t free = device.free_bytes();
  CERTKV_EXPECT(weights + step <= free, OutOfMemory,
                "{} has too little memory: {} for the model's weights (raise parallel.tensor), {} "
                "for a step's activations and the rotary table (lower run.max_batch, "
                "model.max_len); {} of {} are free",
                device.name(), byte_size_text(weights), byte_size_text(step), byte_size_text(free),
                byte_size_text(device.total_bytes()));
}

void set_up_cpu(const JobOptions& options, const EngineParts& parts, ShardRange heads,
                ThreadPool& pool, RankCompute* rank) {
  const ModelConfig& config = *parts.config;
  const DType originals = originals_dtype(options, config);
  auto cache = std::make_unique<CertifiedCache>(config, heads, cache_options(options, config), pool,
                                                parts.store, *parts.group);
  if (parts.audit) {
    rank->audit = std::make_unique<AuditLog>(
        *parts.audit, audit_shape(parts, heads, originals, &cache->format(), false));
    cache->watch(rank->audit.get());
  }
  rank->forward = std::make_unique<Transformer>(
      config, *parts.weights, *parts.group, *cache, pool,
      TransformerOptions{.deterministic = options.deterministic, .originals = originals});
  rank->cache = std::move(cache);
}

void set_up_device(const JobOptions& options, const EngineParts& parts, ShardRange heads,
                   ThreadPool& pool, RankCompute* rank) {
  const ModelConfig& config = *parts.config;
  const std::string& backend = options.run.backend;
  const DType originals = originals_dtype(options, config);
  rank->device = parts.make_device ? parts.make_device(backend, parts.local_rank)
                                   : make_device_backend(backend, parts.local_rank);
  cuda::Device& device = *rank->device.device;
  log_info("device: {}, {} free", device.name(), byte_size_text(device.free_bytes()));
  if (parts.group->size() > 1) {
    if (backend == "emulated") {
      rank->device_group = make_host_group(*parts.group, device);
    } else {
      CERTKV_EXPECT(
          parts.device_control != nullptr, InvalidArgument,
          "run.backend {} over several ranks is there for mpirun-launched jobs alone: set "
          "parallel.tensor 1",
          backend);
      NcclControls controls{parts.device_control(), parts.device_control()};
      rank->device_group = make_nccl_group(std::move(controls), *parts.group, device);
    }
  }
  check_room(parts, transformer_options(options, config), device);
  auto cache = std::make_unique<DeviceCache>(config, heads, cache_options(options, config), device,
                                             *rank->device.cache, pool, parts.store, *parts.group);
  if (parts.audit) {
    rank->audit = std::make_unique<AuditLog>(
        *parts.audit, audit_shape(parts, heads, originals, &cache->format(), true));
    cache->watch(rank->audit.get());
  }
  cache->use_library(*rank->device.dense, *rank->device.model);
  rank->forward = std::make_unique<DeviceTransformer>(
      config, *parts.weights, device,
      DeviceOps{*rank->device.model, *rank->device.linear, *rank->device.dense}, *cache,
      rank->device_group.get(), transformer_options(options, config));
  rank->cache = std::move(cache);
}

}  // namespace

int64_t engine_token_limit(const JobOptions& options, const ModelConfig& config) {
  const int64_t asked = options.model.max_len;
  CERTKV_EXPECT(asked <= config.max_tokens, InvalidArgument,
                "model.max_len is {}: the model's own limit is {} tokens; lower it, or set 0 for "
                "the model's limit",
                asked, config.max_tokens);
  return asked > 0 ? asked : config.max_tokens;
}

DType originals_dtype(const JobOptions& options, const ModelConfig& config) {
  const std::string& name = options.model.dtype;
  if (name == "bfloat16") return DType::BF16;
  if (name == "float16") return DType::F16;
  CERTKV_EXPECT(name == "auto", InvalidArgument,
                "model.dtype is '{}': use auto, bfloat16 or float16", name);
  return config.dtype == DType::F16 ? DType::F16 : DType::BF16;
}

EngineNeed engine_need(const JobOptions& options, const ModelConfig& config, int tensor,
                       int64_t prompt_tokens, int64_t max_tokens, int forks) {
  const CacheNeed c = cache_need(config, config.kv_heads / tensor, cache_options(options, config),
                                 prompt_tokens, max_tokens, forks);
  return {.tier1 = c.tier1,
          .scratch = c.scratch,
          .arena = c.arena,
          .prefill = Transformer::prefill_bytes(config, tensor, prompt_tokens)};
}

RankCompute make_rank_compute(const JobOptions& options, const EngineParts& parts, ShardRange heads,
                              ThreadPool& pool) {
  RankCompute rank;
  if (options.run.backend == "cpu")
    set_up_cpu(options, parts, heads, pool, &rank);
  else
    set_up_device(options, parts, heads, pool, &rank);
  return rank;
}

uint64_t RankCompute::tier1_memory(int local_ranks) const {
  // A tenth of a device is left for a step's buffers and the library's workspaces.
  if (on_device()) return device.device->free_bytes() / 10 * 9;
  return available_memory_bytes() / 2 / uint64_t(local_ranks);
}

EngineNeed RankCompute::need(const JobOptions& options, const ModelConfig& config, ShardRange heads,
                             int tensor, int64_t prompt_tokens, int64_t max_tokens,
                             std::span<const Policy> policies) const {
  EngineNeed n =
      engine_need(options, config, tensor, prompt_tokens, max_tokens, int(policies.size()));
  if (!on_device()) {
    n.host = n.prefill + n.tier1;
    return n;
  }
  const DeviceCache::Need c =
      DeviceCache::need(config, heads.count(), cache_options(options, config),
                        device.device->shape(), prompt_tokens, max_tokens, policies);
  n.on_device = true;
  n.prompt = c.prompt;
  n.tier1 = c.prompt + c.answers;
  n.scratch = c.scratch;
  n.staging = c.staging;
  n.least_staging = c.least_staging;
  const DeviceTransformerOptions transformer = transformer_options(options, config);
  n.prefill = DeviceTransformer::prefill_bytes(config, tensor, prompt_tokens, transformer);
  n.host = DeviceCache::prefill_host_bytes(config, heads.count(), prompt_tokens,
                                           int64_t(transformer.chunk_rows));
  return n;
}

}  // namespace certkv
