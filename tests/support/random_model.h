// A small model of random weights, whole or as the shard of one rank: every group's tiles are drawn
// from streams of their own, so that shards of different group sizes hold the same numbers.
#pragma once

#include <cstdint>

#include "runtime/model_config.h"
#include "runtime/weights.h"

namespace certkv::test {

ModelConfig random_model_config();  // 4 KV heads of 2 heads each, everything else awkwardly sized
Weights random_weights(const ModelConfig& config, int64_t tensor, int64_t rank, uint64_t seed);

}  // namespace certkv::test
