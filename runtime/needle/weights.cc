#include "runtime/needle/weights.h"

#include <cmath>

namespace certkv::needle {
namespace {

// Streams of random numbers, one per part of the model.
enum Stream : uint64_t { kWordStream = 1, kSlotStream, kRareStream, kMlpStream, kLayerStream = 16 };

// Channels of a head. RoPE turns channels m and m + 64 together, the faster the smaller m is.
// The content lives where a turn over the whole context stays below 0.01 rad.
constexpr int kHalf = kHeadDim / 2;
constexpr int kOffsetPairs = int(kOffsetAmplitudes.size());
constexpr int kFirstSlowPair = 29;
constexpr int kContentPairs = 30;  // pairs 29..58, both halves: 60 content channels
constexpr int kContentDims = 64;   // 8 slots of 8: what one KV head compares
constexpr std::array<int, 8> kOutlierChannels = {59, 60, 61, 62, 123, 124, 125, 126};
constexpr int kSinkChannel = 63;

constexpr double kKeyScale = 2.0;    // of a slot's unit vector in the key channels
constexpr double kSinkKey = 8.0;     // key of BOS in the sink channel
constexpr double kSinkNoise = 5e-4;  // keeps the sink channel of other tokens from being constant
constexpr double kPredictionValue = 8.0;
constexpr double kHeadScale = 0.25;
constexpr double kMlpDeviation = 0.02;

struct Attention {
  Grid q{kHeads * kHeadDim, kHidden}, k{kKvHeads * kHeadDim, kHidden};
  Grid v{kKvHeads * kHeadDim, kHidden}, o{kHidden, kHeads*kHeadDim};
};

double frequency(int pair) {
  return std::pow(kTheta, -double(pair) / kHalf);
}

// What RMSNorm multiplies the residual stream by at the input of a layer.
double norm_factor(int layer) {
  return std::sqrt(kHidden / (squared_norms()[size_t(layer)] + kHidden * kEps));
}

// Fills a key channel that no query reads with a token-dependent value of deviation 1, so that a
// quantiser meets the range of an ordinary channel there.
void fill_unread_key(Random& random, Grid& k, int row, double norm) {
  for (int c = 0; c < kCodeDims; ++c) k.at(row, kCode + c) = random.normal() / 8 / norm;
}

// ---- layers 1 and 2: heads that look a fixed number of tokens back ------------------------------

struct OffsetHead {
  int offset;  // tokens back
  int target;  // first place in the residual stream that the copy goes to
};

// Every head copies `width` places of the residual stream from `source` at its offset. The key is
// the constant on the fast pairs; the query is the same turned back by offset positions, so that
// the score is sum A_m cos(theta_m (i - j - offset)).
Attention offset_layer(uint64_t seed, int layer, const std::array<OffsetHead, kHeads>& heads,
                       int source, int width) {
  Attention a;
  const double norm = norm_factor(layer), constant = kConstantValue * norm;
  for (int g = 0; g < kKvHeads; ++g) {
    Random random(seed, kLayerStream + uint64_t(layer * kKvHeads + g));
    const int kv = g * kHeadDim;
    std::array<double, kOffsetAmplitudes.size()> amplitude{};
    for (size_t m = 0; m < amplitude.size(); ++m) {
      amplitude[m] = std::sqrt(kOffsetAmplitudes[m] * std::sqrt(double(kHeadDim)));
      a.k.at(kv + int(m), kConstant) = amplitude[m] / constant;
    }
    for (int pair = kFirstSlowPair; pair < kHalf; ++pair) {
      fill_unread_key(random, a.k, kv + pair, norm);
      fill_unread_key(random, a.k, kv + pair + kHalf, norm);
    }
    // The copy is spread over all 128 value channels by a frame, and gathered by its transpose.
    const Grid frame = orthonormal(random, kHeadDim, width);
    const double spread = std::sqrt(double(kHeadDim) / width);
    for (int c = 0; c < kHeadDim; ++c) {
      for (int n = 0; n < width; ++n) {
        a.v.at(kv + c, source + n) = spread * frame.at(c, n) / (kSlotNorm * norm);
      }
    }
    for (int h = g * kHeads / kKvHeads; h < (g + 1) * kHeads / kKvHeads; ++h) {
      const OffsetHead& head = heads[size_t(h)];
      int sharing = 0;  // heads of this offset, each of which writes its part
      for (const OffsetHead& other : heads) sharing += other.offset == head.offset;
      for (int m = 0; m < kOffsetPairs; ++m) {
        const double turn = frequency(m) * head.offset, size = amplitude[size_t(m)] / constant;
        a.q.at(h * kHeadDim + m, kConstant) = size * std::cos(turn);
        a.q.at(h * kHeadDim + m + kHalf, kConstant) = -size * std::sin(turn);
      }
      for (int n = 0; n < width; ++n) {
        for (int c = 0; c < kHeadDim; ++c) {
          a.o.at(head.target + n, h * kHeadDim + c) = kSlotNorm * frame.at(c, n) / spread / sharing;
        }
      }
    }
  }
  return a;
}

// ---- layer 3: induction -------------------------------------------------------------------------

// Which 8 of the 16 bytes KV head g compares: by the lowest bit of the distance (heads 0 and 1) or
// by the next one (heads 2 and 3), so that every byte is compared by two heads.
std::array<int, 8> compared_slots(int g) {
  std::array<int, 8> slots{};
  size_t n = 0;
  for (int s = 0; s < kSlots; ++s) {
    const int bit = g < 2 ? s & 1 : s >> 1 & 1;
    if (bit == (g & 1)) slots[n++] = s;
  }
  return slots;
}

// [128 channels, 128 slot dims] of one KV head: slots to channels. `outliers` is an orthonormal
// [8, 8] frame; its first 4 columns carry content, the other 4 are orthogonal to every query.
Grid content_channels(Random& random, int g, const Grid& outliers) {
  Grid content(kContentDims, kSlots * kSlotDims);
  std::vector<int> order(kContentDims);
  for (int i = 0; i < kContentDims; ++i) order[size_t(i)] = i;
  random.shuffle(order);
  int row = 0;
  for (const int s : compared_slots(g)) {
    const Grid turn = orthonormal(random, kSlotDims, kSlotDims);
    for (int r = 0; r < kSlotDims; ++r, ++row) {
      for (int c = 0; c < kSlotDims; ++c)
        content.at(order[size_t(row)], s * kSlotDims + c) = turn.at(r, c);
    }
  }
  Grid channels(kHeadDim, kSlots * kSlotDims);
  for (int c = 0; c < channels.cols; ++c) {
    for (int p = 0; p < kContentPairs; ++p) {
      channels.at(kFirstSlowPair + p, c) = content.at(p, c);
      channels.at(kFirstSlowPair + p + kHalf, c) = content.at(kContentPairs + p, c);
    }
    for (int i = 0; i < 8; ++i) {
      double sum = 0;
      for (int k = 0; k < 4; ++k) sum += outliers.at(i, k) * content.at(2 * kContentPairs + k, c);
      channels.at(kOutlierChannels[size_t(i)], c) = sum;
    }
  }
  return channels;
}

void induction_keys(Random& random, const NeedleOptions& options, const Codes& codes, int g,
                    Attention& a) {
  const double norm = norm_factor(2), root_d = std::sqrt(double(kHeadDim));
  const int kv = g * kHeadDim;
  const Grid outliers = orthonormal(random, 8, 8);
  const Grid channels = content_channels(random, g, outliers);
  const double query_scale = options.beta * root_d / (8 * kKeyScale);  // 8 equal bytes score beta
  for (int c = 0; c < kHeadDim; ++c) {
    double of_bos = 0;
    for (int n = 0; n < kSlots * kSlotDims; ++n) {
      const double x = channels.at(c, n) / (kSlotNorm * norm);
      a.k.at(kv + c, kKeySlots + n) = kKeyScale * x;
      for (int h = 2 * g; h < 2 * g + 2; ++h) {
        a.q.at(h * kHeadDim + c, kQuerySlots + n) = query_scale * x;
      }
      of_bos += channels.at(c, n) * codes.slot.at(kBos, n % kSlotDims);
    }
    // BOS saw nothing but itself: its key slots all hold its own vector, which must not match.
    a.k.at(kv + c, kBosFlag) = -kKeyScale * of_bos / (kFlagValue * norm);
  }
  a.k.at(kv + kSinkChannel, kBosFlag) = kSinkKey / (kFlagValue * norm);
  for (int c = 0; c < kCodeDims; ++c) {
    a.k.at(kv + kSinkChannel, kCode + c) = kSinkNoise * random.normal() / norm;
  }
  for (int h = 2 * g; h < 2 * g + 2; ++h) {
    a.q.at(h * kHeadDim + kSinkChannel, kConstant) =
        options.sink * options.beta * root_d / kSinkKey / (kConstantValue * norm);
  }
  for (int pair = 0; pair < kFirstSlowPair; ++pair) {
    fill_unread_key(random, a.k, kv + pair, norm);
    fill_unread_key(random, a.k, kv + pair + kHalf, norm);
  }
  fill_unread_key(random, a.k, kv + kSinkChannel + kHalf, norm);
  // A unit vector of 8 dimensions has entries of deviation 1/sqrt(8).
  const double outlier_scale = options.k_outlier * kKeyScale / std::sqrt(8.0) / 8 / norm;
  for (int k = 4; k < 8; ++k) {
    for (int c = 0; c < kCodeDims; ++c) {
      const double x = outlier_scale * random.normal();
      for (int i = 0; i < 8; ++i) {
        a.k.at(kv + kOutlierChannels[size_t(i)], kCode + c) += outliers.at(i, k) * x;
      }
    }
  }
}

void induction_values(Random& random, const NeedleOptions& options, const Codes& codes, int g,
                      Attention& a) {
  const double norm = norm_factor(2), root2 = std::sqrt(2.0);
  const int kv = g * kHeadDim;
  const Grid frame = orthonormal(random, kHeadDim, kHeadDim);  // 64 read directions, 64 unread ones
  for (int r = 0; r < kHeadDim; ++r) {
    double to_newline = 0;
    for (int c = 0; c < kCodeDims; ++c) {
      a.v.at(kv + r, kCode + c) = root2 * frame.at(r, c) / norm;
      to_newline += frame.at(r, c) * (codes.word.at('\n', c) - codes.word.at(kBos, c));
    }
    a.v.at(kv + r, kBosFlag) = root2 * to_newline / (kFlagValue * norm);  // the sink says newline
    for (int p = 0; p < kPredictionDims; ++p) {
      for (int h = 2 * g; h < 2 * g + 2; ++h) {
        a.o.at(kPrediction + p, h * kHeadDim + r) =
            kPredictionValue / kHeads * frame.at(r, p) / root2;
      }
    }
  }
  // 16 unit vectors in the key slots: norm 4.
  const double nuisance = options.v_nuisance / 4 / (kSlotNorm * norm);
  for (int n = 0; n < kSlots * kSlotDims; ++n) {
    for (int k = kCodeDims; k < kHeadDim; ++k) {
      const double x = nuisance * random.normal();
      for (int r = 0; r < kHeadDim; ++r) a.v.at(kv + r, kKeySlots + n) += frame.at(r, k) * x;
    }
  }
}

Attention induction_layer(const NeedleOptions& options, const Codes& codes) {
  Attention a;
  for (int g = 0; g < kKvHeads; ++g) {
    Random random(options.seed, kLayerStream + uint64_t(2 * kKvHeads + g));
    induction_keys(random, options, codes, g, a);
    induction_values(random, options, codes, g, a);
  }
  return a;
}

Grid embedding(const Codes& codes) {
  Grid e(kVocab, kHidden);
  for (int t = 0; t < kVocab; ++t) {
    for (int c = 0; c < kCodeDims; ++c) e.at(t, kCode + c) = codes.word.at(t, c);
    for (int c = 0; c < kSlotDims; ++c) e.at(t, kQuerySlots + c) = kSlotNorm * codes.slot.at(t, c);
    e.at(t, kConstant) = kConstantValue;
    e.at(t, t == kBos ? kBosFlag : kNormalFlag) = kFlagValue;
  }
  return e;
}

}  // namespace

std::array<double, kLayers> squared_norms() {
  const double token = kCodeDims + kConstantValue * kConstantValue + kFlagValue * kFlagValue;
  const double slot = kSlotNorm * kSlotNorm;
  return {token + slot, token + 8 * slot, token + 32 * slot};  // filled slots of the 32
}

double offset_gap(double distance) {
  double gap = 0;
  for (int m = 0; m < kOffsetPairs; ++m) {
    gap += kOffsetAmplitudes[size_t(m)] * (1 - std::cos(frequency(m) * distance));
  }
  return gap;
}

Codes make_codes(uint64_t seed) {
  Random words(seed, kWordStream), roots_random(seed, kSlotStream), rare(seed, kRareStream);
  const Grid all = kerdock_words(words), roots = e8_roots(roots_random);
  Codes codes{Grid(kVocab, kCodeDims), Grid(kVocab, kSlotDims)};
  int root = 0;
  for (int t = 0; t < kVocab; ++t) {
    for (int c = 0; c < kCodeDims; ++c) codes.word.at(t, c) = all.at(t, c);
    const bool never_in_text = t == 0xc0 || t == 0xc1 || (t >= 0xf1 && t <= 0xff) || t > kBos;
    double norm = 0;
    for (int c = 0; c < kSlotDims; ++c) {
      codes.slot.at(t, c) = never_in_text ? rare.normal() : roots.at(root, c);
      norm += codes.slot.at(t, c) * codes.slot.at(t, c);
    }
    for (int c = 0; c < kSlotDims; ++c) codes.slot.at(t, c) /= std::sqrt(norm);
    root += never_in_text ? 0 : 1;
  }
  return codes;
}

std::vector<NamedTensor> make_weights(const NeedleOptions& options) {
  const Codes codes = make_codes(options.seed);
  std::vector<NamedTensor> all;
  const auto add = [&all](std::string name, Grid g) {
    all.push_back({std::move(name), {g.rows, g.cols}, std::move(g.values)});
  };
  const auto add_ones = [&all](std::string name) {
    all.push_back({std::move(name), {kHidden}, std::vector<double>(kHidden, 1.0)});
  };

  add("model.embed_tokens.weight", embedding(codes));
  std::array<OffsetHead, kHeads> first{}, second{};
  for (int h = 0; h < kHeads; ++h) {
    const int back = h % 7 + 1;  // 1..7, and 1 once more
    first[size_t(h)] = {back, kQuerySlots + back * kSlotDims};
    second[size_t(h)] = h % 3 == 0   ? OffsetHead{8, kQuerySlots + 8 * kSlotDims}
                        : h % 3 == 1 ? OffsetHead{1, kKeySlots}
                                     : OffsetHead{9, kKeySlots + 8 * kSlotDims};
  }
  for (int l = 0; l < kLayers; ++l) {
    Attention a = l == 0   ? offset_layer(options.seed, 0, first, kQuerySlots, kSlotDims)
                  : l == 1 ? offset_layer(options.seed, 1, second, kQuerySlots, 8 * kSlotDims)
                           : induction_layer(options, codes);
    const std::string p = "model.layers." + std::to_string(l) + ".";
    add_ones(p + "input_layernorm.weight");
    add(p + "self_attn.q_proj.weight", std::move(a.q));
    add(p + "self_attn.k_proj.weight", std::move(a.k));
    add(p + "self_attn.v_proj.weight", std::move(a.v));
    add(p + "self_attn.o_proj.weight", std::move(a.o));
    add_ones(p + "post_attention_layernorm.weight");
    // The MLP runs, and adds nothing: its last product is with zeros.
    Random random(options.seed, kMlpStream + 256 * uint64_t(l + 1));
    for (const char* name : {"mlp.gate_proj.weight", "mlp.up_proj.weight"}) {
      Grid g(kIntermediate, kHidden);
      for (double& x : g.values) x = kMlpDeviation * random.normal();
      add(p + name, std::move(g));
    }
    add(p + "mlp.down_proj.weight", Grid(kHidden, kIntermediate));
  }
  add_ones("model.norm.weight");
  Grid head(kVocab, kHidden);  // BOS and padding keep logit 0 and are never the largest
  for (int t = 0; t < kTokens; ++t) {
    for (int p = 0; p < kPredictionDims && t != kBos; ++p) {
      head.at(t, kPrediction + p) = kHeadScale * codes.word.at(t, p);
    }
  }
  add("lm_head.weight", std::move(head));
  return all;
}

}  // namespace certkv::needle
