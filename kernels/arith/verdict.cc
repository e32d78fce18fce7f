#include "kernels/arith/verdict.h"

namespace certkv {

const char* outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::Certified: return "certified";
    case Outcome::Exact: return "exact";
    case Outcome::Failed: return "failed";
    case Outcome::Over: return "over";
  }
  return "unknown";
}

}  // namespace certkv
