// What ranges of key channels would rule out: key_ranges_bench AUDIT_FOLDER | diffuse|mixed|sharp
// [TOKENS]
//
// A block whose keys are not read may still be bounded: sbar_b = sum_c max(q_c lo_bc, q_c hi_bc) /
// sqrt(d) is at least every score in it, so leaving it out costs at most 16 exp(sbar_b - m) / Z
// (nu_b + ||O||) (method E6). Of each head-step this prints how many blocks could be left out, the
// cheapest first, until a tenth of a relative tolerance of 0.05 is spent, with the ranges of the
// block's own keys, of its scale group of 64 tokens, and if its mass were known. Heads are those of
// an audit's records, or synthetic ones (runtime/bench/synthetic_heads.h, head dimension 128).
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "kernels/base/error.h"
#include "runtime/audit/reader.h"
#include "runtime/bench/synthetic_heads.h"

namespace {

using namespace certkv;

constexpr size_t kBlock = 16, kGroup = 64;
constexpr double kSpend = 0.1 * 0.05;

struct Head {
  size_t d = 0;
  std::vector<float> k, v;  // [tokens, d]
  size_t tokens() const { return k.size() / d; }
};

// Shares of the blocks; means over head-steps.
struct Shares {
  double by_block = 0, by_group = 0, by_mass = 0;
  double excess = 0;  // of a block's bounded cost over its true one, in the exponent
  size_t count = 0;
};

double share_within(std::vector<double> cost, double limit) {
  std::sort(cost.begin(), cost.end());
  size_t n = 0;
  double sum = 0;
  while (n < cost.size() && sum + cost[n] <= limit) sum += cost[n++];
  return double(n) / double(cost.size());
}

double upper_score(const Head& x, const float* q, size_t first, size_t last) {
  double sum = 0;
  for (size_t c = 0; c < x.d; ++c) {
    double lo = x.k[first * x.d + c], hi = lo;
    for (size_t t = first + 1; t < last; ++t) {
      lo = std::min(lo, double(x.k[t * x.d + c]));
      hi = std::max(hi, double(x.k[t * x.d + c]));
    }
    sum += std::max(q[c] * lo, q[c] * hi);
  }
  return sum / std::sqrt(double(x.d));
}

void add(const Head& x, size_t tokens, const float* q, Shares* to) {
  const size_t d = x.d, blocks = tokens / kGroup * (kGroup / kBlock);
  if (blocks == 0) return;
  std::vector<double> score(tokens), norm(tokens);
  for (size_t t = 0; t < tokens; ++t) {
    double s = 0, n = 0;
    for (size_t c = 0; c < d; ++c) {
      s += double(q[c]) * double(x.k[t * d + c]);
      n += double(x.v[t * d + c]) * double(x.v[t * d + c]);
    }
    score[t] = s / std::sqrt(double(d));
    norm[t] = std::sqrt(n);
  }
  const double m = *std::max_element(score.begin(), score.end());
  double z = 0, s = 0, out2 = 0;
  std::vector<double> out(d);
  for (size_t t = 0; t < tokens; ++t) {
    const double w = std::exp(score[t] - m);
    z += w;
    s += w * norm[t];
    for (size_t c = 0; c < d; ++c) out[c] += w * double(x.v[t * d + c]);
  }
  for (double o : out) out2 += o * o / (z * z);
  std::vector<double> by_block(blocks), by_group(blocks), by_mass(blocks);
  double excess = 0;
  for (size_t b = 0; b < blocks; ++b) {
    const size_t first = b * kBlock, group = first / kGroup * kGroup;
    double nu = 0, mass = 0;
    for (size_t t = first; t < first + kBlock; ++t) {
      nu = std::max(nu, norm[t]);
      mass += std::exp(score[t] - m);
    }
    const double weight = (nu + std::sqrt(out2)) / z;
    const double bound = upper_score(x, q, first, first + kBlock);
    by_block[b] = kBlock * std::exp(bound - m) * weight;
    by_group[b] = kBlock * std::exp(upper_score(x, q, group, group + kGroup) - m) * weight;
    by_mass[b] = mass * weight;
    excess += std::log(by_block[b] / by_mass[b]) / double(blocks);
  }
  const double limit = kSpend * s / z;
  to->by_block += share_within(by_block, limit);
  to->by_group += share_within(by_group, limit);
  to->by_mass += share_within(by_mass, limit);
  to->excess += excess;
  ++to->count;
}

void append(const std::string& bytes, size_t rows, bool bf16, Head* x) {
  const DType type = bf16 ? DType::BF16 : DType::F16;
  for (size_t i = 0; i < 2 * rows * x->d; ++i) {
    uint16_t bits;
    std::memcpy(&bits, bytes.data() + 2 * i, 2);
    (i < rows * x->d ? x->k : x->v).push_back(float_from_16(type, bits));
  }
}

Shares of_audit(const std::string& folder) {
  Shares all;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != audit::kExtension) continue;
    const audit::FileIndex f = audit::read_index(entry.path().string(), [](uint64_t) {});
    CERTKV_EXPECT(f.broken.empty(), BadFile, "{}: {}", f.path, f.broken);
    const audit::PayloadReader payloads(f.path);
    std::string bytes;
    audit::Record record;
    for (const auto& [key, records] : f.record) {
      Head x{.d = size_t(f.header.layout.head_dim), .k = {}, .v = {}};
      audit::UnitKey prompt = key;
      prompt.stream = f.streams.at(key.stream).prompt;
      for (const audit::UnitKey& unit : {prompt, key}) {
        const auto rows = f.rows.find(unit);
        if (rows == f.rows.end()) continue;
        for (const audit::RowsRef& r : rows->second)
          if (payloads.read(r.place, &bytes)) append(bytes, r.rows, f.header.bf16, &x);
      }
      CERTKV_EXPECT(payloads.read(records.back().place, &bytes), BadFile, "{}: cut short", f.path);
      const std::string wrong = audit::decode(bytes, x.d, &record);
      CERTKV_EXPECT(wrong.empty() && record.head.tokens <= x.tokens(), BadFile, "{}: {}", f.path,
                    wrong);
      for (const audit::HeadRecord& h : record.heads) add(x, record.head.tokens, h.q.data(), &all);
    }
  }
  return all;
}

Shares of_synthetic(HeadKind kind, size_t tokens) {
  Shares all;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    SyntheticShape shape{.kind = kind, .tokens = tokens, .query_steps = 1};
    const SyntheticHead head = make_synthetic_head(shape, seed);
    Head x{.d = size_t(shape.head_dim), .k = {}, .v = {}};
    for (uint16_t bits : head.k) x.k.push_back(float_from_16(shape.dtype, bits));
    for (uint16_t bits : head.v) x.v.push_back(float_from_16(shape.dtype, bits));
    for (int h = 0; h < shape.query_heads; ++h)
      add(x, tokens, head.q.data() + size_t(h) * x.d, &all);
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    fmt::print(stderr, "usage: key_ranges_bench AUDIT_FOLDER | diffuse|mixed|sharp [TOKENS]\n");
    return 2;
  }
  const std::string what = argv[1];
  const size_t tokens = argc > 2 ? size_t(std::atoll(argv[2])) : 32768;
  const Shares s = std::filesystem::is_directory(what)
                       ? of_audit(what)
                       : of_synthetic(head_kind_from_name(what), tokens);
  const double n = double(s.count) / 100;
  fmt::print(
      "{} head-steps. Blocks that could be left out: {:.2f} % by their own keys' ranges, {:.2f} % "
      "by "
      "their scale groups', {:.2f} % if their masses were known.\nA block's bound exceeds its cost "
      "by "
      "exp({:.1f}), mean of the exponents.\n",
      s.count, s.by_block / n, s.by_group / n, s.by_mass / n, s.excess / double(s.count));
  return s.count > 0 ? 0 : 1;
} catch (const certkv::Error& e) {
  fmt::print(stderr, "{}\n", e.what());
  return 1;
}
