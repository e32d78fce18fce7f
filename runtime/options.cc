#include "runtime/options.h"

namespace certkv {

const char* policy_name(Policy policy) {
  switch (policy) {
    case Policy::Budget:
      return "budget";
    case Policy::Paper:
      return "paper";
    case Policy::Naive:
      return "naive";
    case Policy::Dense:
      return "dense";
  }
  return "unknown";
}

std::optional<Policy> policy_from_name(std::string_view name) {
  for (const Policy p : {Policy::Budget, Policy::Paper, Policy::Naive, Policy::Dense}) {
    if (name == policy_name(p)) return p;
  }
  return std::nullopt;
}

bool tolerance_allowed(const Tolerance& tolerance) {
  return tolerance.value >= 0 && tolerance.value <= kMaxTolerance;
}

std::string tier1_digest_name(const CacheOptions& cache) {
  return cache.scrub_steps == 0 ? "none" : "scrub:" + std::to_string(cache.scrub_steps);
}

}  // namespace certkv
