// A model folder run by one or more thread ranks over an uncertified cache: what goldens are
// compared with.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "runtime/model_config.h"

namespace certkv::test {

struct GreedyRun {
  std::vector<float> first_logits;  // of the prompt's last token
  std::vector<float> final_logits;  // after the last id
  std::vector<int32_t> ids;
};

// Prefills the prompt and feeds `continuation` token by token, so that one wrong choice does not
// spoil the rest; ids are what greedy decoding would have chosen at each step. Keys and values are
// kept in the model's own type.
GreedyRun run_model(const std::filesystem::path& folder, int tensor, int threads,
                    bool deterministic, std::span<const int32_t> prompt,
                    std::span<const int32_t> continuation);

}  // namespace certkv::test
