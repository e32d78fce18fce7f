// What the scrub of tier 1 costs beside the pass, on one thread: scrub_bench [TOKENS [KV_HEADS]]
// Figures are medians over heads and repeats, in turn, of one layer with 4 query heads a KV head of
// dimension 128.
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>

#include "kernels/base/dtype.h"
#include "kernels/digest.h"
#include "kernels/quantize.h"
#include "runtime/certify/scrub.h"

namespace {

using namespace certkv;

constexpr int kDim = 128, kQueries = 4, kRepeats = 9;

class NoOriginals : public HeadOriginals {
 public:
  void read(std::span<const uint32_t> blocks, std::span<const Destination>,
            std::vector<BlockResult>* results) override {
    results->assign(blocks.size(), {});  // policy naive asks for none
  }
};

template <typename Body>
double seconds(const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const size_t tokens = argc > 1 ? size_t(std::atoll(argv[1])) : 32768;
  const size_t kv_heads = argc > 2 ? size_t(std::atoll(argv[2])) : 8;
  const auto format =
      std::make_shared<const PageFormat>(make_page_format(layout_by_name("compact"), kDim, 16));
  const size_t d = kDim, group = size_t(format->group_tokens);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> k(group * d), v(group * d);
  std::vector<HeadState> heads;
  std::vector<double> fill, digest;
  for (size_t h = 0; h < kv_heads; ++h) {
    heads.emplace_back(DeviceTier(format, DType::F16, std::make_shared<TierAccount>()), 1, 1);
    for (size_t t = 0; t < tokens; t += group) {
      for (uint16_t& x : k) x = float_to_f16(normal(random));
      for (uint16_t& x : v) x = float_to_f16(normal(random));
      fill.push_back(seconds([&] { heads[h].tier.append(k.data(), v.data(), group, {}); }));
      digest.push_back(seconds([&] { (void)heads[h].tier.check_page(t / group); }));
    }
  }
  const double page = double(format->page_bytes), pages = double(tokens / group);
  fmt::print("{} tokens, {} KV heads, {} pages of {} bytes each\n", tokens, kv_heads, pages, page);
  fmt::print("sealing a page {:.1f} us, verifying it right after {:.2f} us\n", median(fill) * 1e6,
             median(digest) * 1e6);

  std::vector<std::byte> near(format->page_bytes);
  for (const DigestVersion& version : digest_versions()) {
    std::vector<double> times;
    uint64_t sum = 0;
    for (int repeat = 0; repeat < 201; ++repeat)
      times.push_back(seconds([&] { sum += version.digest(near.data(), near.size()); }));
    fmt::print("digest of a page in the cache, {}: {:.1f} GB/s\n", version.isa,
               sum == 0 ? 0.0 : page / median(times) * 1e-9);
  }

  StepRules rules;
  rules.policy = Policy::Naive;
  NoOriginals originals;
  std::vector<float> q(kQueries * d), out(kQueries * d);
  for (float& x : q) x = normal(random);
  GroupReport report;
  std::vector<PageFinding> found;
  std::vector<double> pass, share, all;
  for (int repeat = 0; repeat < kRepeats; ++repeat)
    for (size_t h = 0; h < kv_heads; ++h) {
      const StepWhere where{.kv_head = int(h), .step = tokens + 1 + uint64_t(repeat)};
      share.push_back(seconds([&] { scrub_due(ScrubSchedule(256), where, heads[h], &found); }));
      pass.push_back(seconds([&] {
        head_step(rules, where, kQueries, q.data(), &heads[h], originals, out.data(), nullptr,
                  &report);
      }));
      all.push_back(seconds([&] { scrub_due(ScrubSchedule(1), where, heads[h], &found); }));
    }
  const double us = median(pass) * 1e6;
  fmt::print("pass {:.0f} us per KV head\n", us);
  const auto line = [&](const char* what, double s, double bytes) {
    fmt::print("{}: {:.1f} us, {:.1f} GB/s, {:.2f} % of the pass\n", what, s * 1e6,
               bytes / s * 1e-9, 100 * s * 1e6 / us);
  };
  line("scrub_steps 256", median(share), page * pages / 256);
  line("scrub_steps 1", median(all), page * pages);
  return found.empty() ? 0 : 1;
}
