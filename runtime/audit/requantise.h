// The verifier's own quantiser: what the stored form of given originals must be, in float64,
// written from the method's text (sections 2 and 3). Calls nothing of the product's arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace certkv::audit {

struct PlaneRules {
  int code_bits = 8, residual_bits = 0;
  bool read_residual = false, half_metadata = true;  // metadata F16, else F32
};

struct LayoutRules {
  int head_dim = 0, block_tokens = 0, group_tokens = 0, value_group = 0;
  PlaneRules key, value;
  // A device's order of bytes: values are halves times a power of two of their scale group, and a
  // group is sealed behind the step that fills it.
  bool device = false;
};

// Originals of one KV head and their stored form, growing.
class HeadRows {
 public:
  HeadRows(const LayoutRules& rules, bool bf16);

  // k, v: [rows, head_dim] 16-bit; every group that becomes whole is quantised.
  // NaN or infinite originals are never served: nothing is quantised after them.
  void append(size_t rows, const uint16_t* k, const uint16_t* v);

  const LayoutRules& rules() const { return rules_; }
  size_t tokens() const { return k_norm_.size(); }
  bool finite() const { return finite_; }  // of all originals so far

  // Originals, exact in float. [tokens, head_dim]
  std::vector<float> k, v;
  // Codes and lines: x^ = code * step + base.
  std::vector<uint16_t> k_code, v_code;  // [quantised tokens, head_dim]
  std::vector<double> k_step, k_base;    // [groups, head_dim]
  std::vector<double> v_step, v_base;    // [quantised tokens, value groups]
  std::vector<float> v_served;           // [quantised tokens, head_dim] v^ on a device, else empty
  std::vector<double> served_norm;       // [quantised tokens] ||v^_t||
  std::vector<double> served_max;        // [blocks of quantised groups] largest of the group
  struct Group {
    bool quantised = false;  // false: a scale or offset is out of range; originals serve
  };
  struct Block {  // of quantised groups
    double kappa = 0, e = 0, eta = 0;
    double vbar = 0;  // max_t || |base| + code step ||: bounds what a sum of codes passes through
  };
  std::vector<Group> groups;
  std::vector<Block> blocks;

  double k_norm(size_t token) const { return k_norm_[token]; }
  double v_norm(size_t token) const { return v_norm_[token]; }
  // Largest code that a key is read with.
  int key_levels() const;

 private:
  void quantise(size_t group);
  bool quantise_keys(size_t first);
  bool quantise_values(size_t first);
  void serve_halves(size_t first);

  LayoutRules rules_;
  std::vector<float> decoded_;  // of every 16-bit pattern
  std::vector<double> k_norm_, v_norm_;
  bool finite_ = true;
};

}  // namespace certkv::audit
