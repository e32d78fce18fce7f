#include "runtime/record_json.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/json_file.h"

namespace certkv {
namespace {

using nlohmann::json;

const char* not_finite(double x) {
  return std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
}

// Within the project a figure that is not finite travels as a string.
json wire(double x) {
  return std::isfinite(x) ? json(x) : json(not_finite(x));
}
double unwire(const json& v) {
  if (v.is_number()) return v.get<double>();
  if (v == "nan") return std::numeric_limits<double>::quiet_NaN();
  if (v == "inf") return std::numeric_limits<double>::infinity();
  if (v == "-inf") return -std::numeric_limits<double>::infinity();
  CERTKV_THROW(BadFile, "a figure was expected, found {}", v.type_name());
}

Policy policy_of(const json& v) {
  const auto policy = policy_from_name(v.get<std::string>());
  CERTKV_EXPECT(policy.has_value(), BadFile, "policy {} is not known", v.dump());
  return *policy;
}

json counts_wire(const HeadStepCounts& c) {
  return json::array({c.head_steps, c.certified, c.exact, c.over, c.failed, c.rungs,
                      c.promoted_keys, c.promoted_values, c.scratch_hits, c.scratch_misses,
                      c.paged_bytes, c.canary, c.digest, c.read_bytes, c.attended_tokens,
                      c.dense_bytes, c.prefetched, c.prefetched_used});
}
HeadStepCounts counts_of(const json& v) {
  HeadStepCounts c;
  c.head_steps = v.at(0);
  c.certified = v.at(1);
  c.exact = v.at(2);
  c.over = v.at(3);
  c.failed = v.at(4);
  c.rungs = v.at(5);
  c.promoted_keys = v.at(6);
  c.promoted_values = v.at(7);
  c.scratch_hits = v.at(8);
  c.scratch_misses = v.at(9);
  c.paged_bytes = v.at(10);
  c.canary = v.at(11);
  c.digest = v.at(12);
  c.read_bytes = v.at(13);
  c.attended_tokens = v.at(14);
  c.dense_bytes = v.at(15);
  c.prefetched = v.at(16);
  c.prefetched_used = v.at(17);
  return c;
}

json histogram_wire(const BoundHistogram& h) {
  json bins = json::array();
  for (size_t i = 0; i < h.bins.size(); ++i) {
    if (h.bins[i] != 0) bins.push_back(json::array({i, h.bins[i]}));
  }
  return json::array({h.count, wire(h.max), wire(h.sum), bins});
}
BoundHistogram histogram_of(const json& v) {
  BoundHistogram h;
  h.count = v.at(0);
  h.max = unwire(v.at(1));
  h.sum = unwire(v.at(2));
  for (const json& bin : v.at(3)) {
    const auto at = bin.at(0).get<uint64_t>();
    CERTKV_EXPECT(at < uint64_t(BoundHistogram::kBins), BadFile, "histogram bin {}", at);
    if (h.bins.empty()) h.bins.resize(BoundHistogram::kBins);
    h.bins[at] = bin.at(1);
  }
  return h;
}

template <typename Decode>
auto decoding(const char* what, Decode decode) {
  try {
    return decode();
  } catch (const json::exception& e) {
    CERTKV_THROW(BadFile, "{}: {}", what, e.what());
  }
}

}  // namespace

void put_figure(json& object, const char* key, double x) {
  if (std::isfinite(x)) {
    object[key] = x;
    return;
  }
  object[key] = nullptr;
  object["notes"][key] = not_finite(x);
}

json tolerance_json(const Tolerance& t) {
  json v;
  put_figure(v, t.is_relative ? "relative" : "absolute", t.value);
  return v;
}

void put_counts(json& object, const HeadStepCounts& c) {
  object["head_steps"] = c.head_steps;
  object["certified"] = c.certified;
  object["exact"] = c.exact;
  object["over"] = c.over;
  object["failed"] = c.failed;
  json rungs;
  for (size_t r = 0; r < c.rungs.size(); ++r) rungs[std::to_string(r)] = c.rungs[r];
  object["rungs"] = rungs;
  object["promoted_keys"] = c.promoted_keys;
  object["promoted_values"] = c.promoted_values;
  const uint64_t wanted = c.scratch_hits + c.scratch_misses;
  object["scratch_hit_rate"] = wanted == 0 ? json() : json(double(c.scratch_hits) / double(wanted));
  object["paged_bytes"] = c.paged_bytes;
  object["prefetched_blocks"] = c.prefetched;
  object["prefetched_used_blocks"] = c.prefetched_used;
  const auto ratio = [](uint64_t a, uint64_t b) {
    return b == 0 ? json() : json(double(a) / double(b));
  };
  object["bytes_read_per_token"] = ratio(c.read_bytes, c.attended_tokens);
  object["bytes_read_share"] = ratio(c.read_bytes, c.dense_bytes);
  object["canary_failures"] = c.canary;
  object["digest_failures"] = c.digest;
}

std::string json_line(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

json completion_json(const Completion& c) {
  json v = {{"id", c.id},
            {"policy", policy_name(c.policy)},
            {"failed", c.failed},
            {"tokens", c.tokens},
            {"text", c.text},
            {"finish", c.finish_reason},
            {"severity", severity(c.outcome)},
            {"counts", counts_wire(c.counts)},
            {"worst", json::array({wire(c.bound_max), wire(c.relative_max), wire(c.bound_mean),
                                   wire(c.relative_mean)})},
            {"returned",
             json::array({histogram_wire(c.returned.bound), histogram_wire(c.returned.relative)})},
            {"candidate", json::array({histogram_wire(c.candidate.bound),
                                       histogram_wire(c.candidate.relative)})},
            {"prompt_tokens", c.prompt_tokens},
            {"reused_tokens", c.reused_tokens},
            {"bytes", json::array({c.tier1_bytes, c.dense_bytes})},
            {"seconds", json::array({wire(c.prefill_seconds), wire(c.decode_seconds)})}};
  if (c.failed) v["error"] = json::array({c.error_kind, c.error});
  return v;
}

Completion completion_from_json(const json& v) {
  return decoding("a finished line", [&] {
    Completion c;
    c.id = v.at("id");
    c.policy = policy_of(v.at("policy"));
    c.failed = v.at("failed");
    c.tokens = v.at("tokens").get<std::vector<int32_t>>();
    c.text = v.at("text");
    c.finish_reason = v.at("finish");
    c.outcome = outcome_of_severity(v.at("severity").get<uint64_t>());
    c.counts = counts_of(v.at("counts"));
    c.bound_max = unwire(v.at("worst").at(0));
    c.relative_max = unwire(v.at("worst").at(1));
    c.bound_mean = unwire(v.at("worst").at(2));
    c.relative_mean = unwire(v.at("worst").at(3));
    c.returned.bound = histogram_of(v.at("returned").at(0));
    c.returned.relative = histogram_of(v.at("returned").at(1));
    c.candidate.bound = histogram_of(v.at("candidate").at(0));
    c.candidate.relative = histogram_of(v.at("candidate").at(1));
    c.prompt_tokens = v.at("prompt_tokens");
    c.reused_tokens = v.value("reused_tokens", uint64_t(0));  // of an earlier version: not there
    c.tier1_bytes = v.at("bytes").at(0);
    c.dense_bytes = v.at("bytes").at(1);
    c.prefill_seconds = unwire(v.at("seconds").at(0));
    c.decode_seconds = unwire(v.at("seconds").at(1));
    if (c.failed) {
      c.error_kind = v.at("error").at(0);
      c.error = v.at("error").at(1);
    }
    return c;
  });
}

std::string encode_completion(const Completion& c) {
  return json_line(completion_json(c));
}

Completion decode_completion(std::string_view text) {
  return completion_from_json(
      parse_json(text, "a completion from another rank", {.max_bytes = size_t(1) << 30}));
}

std::string upper_text(double x, int digits) {
  if (!std::isfinite(x)) return not_finite(x);
  std::string text = fmt::format("{:.{}g}", x, digits);
  if (std::strtod(text.c_str(), nullptr) >= x) return text;
  // One unit more in the last digit shown: x (1 + 10^(1 - digits)) rounds to at least that.
  const double step = std::pow(10.0, std::floor(std::log10(std::fabs(x))) - (digits - 1));
  text = fmt::format("{:.{}g}", x + step, digits);
  return text;
}

}  // namespace certkv
