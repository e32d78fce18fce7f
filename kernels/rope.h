// Rotary position embedding: frequencies, tables and rotation.
//
// Pair m of a head is (x[m], x[m + d/2]) ("rotate half", as Hugging Face models store their
// weights); at position p it turns by the angle p * frequency[m]. UNITS: radians per position.
// SOURCE: Su et al., "RoFormer", 2021. Frequencies are [head_dim / 2].
//
// Frequencies and angles are computed in double, so that a cosine is right to float rounding at any
// position below 2^17 and any theta up to 1e16: the angle's relative error is a few 2^-53, which is
// below 1e-10 rad at 131,071 rad. (In float it would be 0.008 rad.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace certkv {

// frequency[m] = theta^(-2m / head_dim), m in [0, head_dim / 2). Throws InvalidArgument unless
// theta > 1 is finite and head_dim even.
std::vector<double> rope_frequencies(double theta, size_t head_dim);

// Position interpolation (SOURCE: arXiv 2306.15595): every frequency divided by `factor`.
void rope_scale_linear(std::span<double> frequency, double factor);

// Llama 3 (SOURCE: its model code): wavelengths above original / low_freq_factor are divided by
// `factor`, those below original / high_freq_factor are kept, between them linear in original /
// wavelength. REQUIRES low_freq_factor < high_freq_factor.
void rope_scale_llama3(std::span<double> frequency, double factor, double low_freq_factor,
                       double high_freq_factor, double original_positions);

// YaRN (SOURCE: arXiv 2309.00071): pairs that turn more than beta_fast times over the original
// positions are kept, fewer than beta_slow times are divided by `factor`, a linear ramp over the
// pair index between them, whose ends are rounded outward to whole pairs iff `truncate`.
void rope_scale_yarn(std::span<double> frequency, double theta, double factor, double beta_fast,
                     double beta_slow, bool truncate, double original_positions);

// Cosines and sines of a range of positions, each times `magnitude` (YaRN's attention factor).
struct RopeTable {
  size_t pairs = 0;
  std::vector<float> cos, sin;  // [positions, pairs]

  // Of positions first .. first + positions - 1; frequency: [pairs].
  void fill(std::span<const double> frequency, double magnitude, int64_t first, size_t positions);
};

// Rotates `heads` consecutive heads [heads, 2 * pairs] in place by row `row` of the table.
// REQUIRES row below the positions filled.
void rope_rotate(const RopeTable& table, size_t row, float* x, size_t heads);

}  // namespace certkv
