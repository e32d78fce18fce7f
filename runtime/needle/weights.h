// The numbers of needle: its shape, and its weights before rounding to 16 bits.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "runtime/needle/codes.h"
#include "runtime/needle_model.h"

namespace certkv::needle {

inline constexpr int kHidden = 384, kHeadDim = 128, kHeads = 8, kKvHeads = 4, kLayers = 3;
inline constexpr int kIntermediate = 64, kVocab = 288, kMaxPositions = 131072;
inline constexpr int kBos = 256, kEos = 257,
                     kTokens = 258;  // the rest of the vocabulary is padding
inline constexpr double kTheta = 1e16, kEps = 1e-5;

// Places in the residual stream [384].
inline constexpr int kCode = 0, kCodeDims = 64;  // code of the token, entries +-1
inline constexpr int kQuerySlots = 64;           // 16 slots of 8: bytes i, i-1, ..., i-15
inline constexpr int kKeySlots = 192;            // 16 slots of 8: bytes j-1, ..., j-16
inline constexpr int kSlotDims = 8, kSlots = 16;
inline constexpr int kPrediction = 320, kPredictionDims = 60;  // code of the token that comes next
inline constexpr int kConstant = 380, kNormalFlag = 381, kBosFlag = 382;  // 383 stays 0

inline constexpr double kSlotNorm = 2.0, kConstantValue = 64.0, kFlagValue = 8.0;

// Squared norm of the residual stream at the input of each layer: the same for every token, so that
// RMSNorm is a known factor.
std::array<double, kLayers> squared_norms();

// Amplitude in nats of the cosine that each of the 16 fastest RoPE pairs adds to an offset score.
inline constexpr std::array<double, 16> kOffsetAmplitudes = {30, 24, 18, 14, 12, 10, 8, 8,
                                                             8,  8,  6,  6,  6,  6,  6, 6};
// Score at the wanted offset minus score `distance` away from it, in nats.
double offset_gap(double distance);

struct Codes {
  Grid word;  // [288, 64]: +-1 per token
  Grid slot;  // [288, 8]: unit vector per token; roots of E8 for BOS and all bytes that occur in
              // valid UTF-8 below U+40000, so that two such bytes never come closer than 1/2
};
Codes make_codes(uint64_t seed);

struct NamedTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<double> values;
};
// All tensors of the model, with the names of LlamaForCausalLM.
std::vector<NamedTensor> make_weights(const NeedleOptions& options);

}  // namespace certkv::needle
