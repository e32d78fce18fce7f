// Generated attention problems that attack the certified core, and the run that judges it on them.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "runtime/certify/head_step.h"
#include "tests/support/memory_originals.h"
#include "tests/support/oracle.h"

namespace certkv {

enum class Shape {
  Random,
  OutlierChannels,   // a few channels 50 times larger than the rest
  Sink,              // the first token holds almost all mass
  NearDuplicates,    // all keys within a hair of a few
  CommonMean,        // values with a mean of 1000 times their spread
  ConstantChannels,  // channels and value groups that do not vary
  Denormals,         // of the originals' type
  Huge,              // 1e20 in BF16, 3e4 in F16
  ZeroValues,
  GridValues,        // values that the codes represent exactly: only keys err
  UnweightedGiant,   // one token of huge value and no weight beside values on the grid
};
inline constexpr int kShapes = 11;
const char* shape_name(Shape shape);

struct AttentionCase {
  uint64_t seed = 0;
  Shape shape = Shape::Random;
  std::string layout = "compact";
  DType dtype = DType::BF16;
  int head_dim = 64, block_tokens = 16, heads = 1;
  size_t tokens = 1;
  int steps = 1;
  size_t key_quota = 0, value_quota = 0;
  float q_scale = 1;
  StepRules rules;
  std::string describe() const;
};

// Everything but the shape drawn from the seed; lengths around block and group edges.
AttentionCase draw_case(Shape shape, uint64_t seed);

// Appends `tokens` rows of the case's shape. The generator carries what rows have in common.
class RowMaker {
 public:
  explicit RowMaker(const AttentionCase& c);
  void append(size_t tokens, oracle::Originals* x);
  std::vector<float> query();  // [heads, head_dim], close to the one before
 private:
  double normal() { return normal_(random_); }
  uint16_t bits(double x) const;
  AttentionCase c_;
  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  std::vector<double> key_mean_, value_mean_, pattern_;
  std::vector<float> q_;
  size_t made_ = 0;
};

struct CaseResult {
  std::vector<std::string> violations;
  int certified = 0, exact = 0, over = 0, failed = 0, broken = 0;
  int head_steps = 0;
  uint64_t learned = 0;  // originals that passes found resident
  uint64_t skipped = 0;  // blocks whose values were not read
  int promoted = 0;      // head-steps that climbed to rungs 1 or 2
};

// The claim that a report makes about one head.
oracle::Claim claim_of(const StepRules& rules, const HeadReport& report);

// Runs every step, rung 4 included, and judges every head of each.
CaseResult run_case(const AttentionCase& c);

}  // namespace certkv
