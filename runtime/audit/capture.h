// What one KV head's step leaves for its audit record, taken from the state that the returned
// outputs and bounds came from.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attend.h"

namespace certkv {

struct CorrectionLog;

struct AuditCapture {
  struct Head {
    std::vector<double> mass;       // [blocks] rho'_b
    std::vector<float> delta, eta;  // [blocks] charged
    std::vector<uint8_t> used;      // [blocks] kUsedKey | kUsedValue
    uint32_t corrections = 0;
  };
  std::vector<float> nu;  // [blocks]
  std::vector<Head> heads;
};

// Takes what head `from` of the pass was certified with as head `to` of the step; a later call for
// the same head replaces it (rungs 3 and 4).
void capture_head(const PassState& pass, int from, const CorrectionLog& corrections, int to,
                  AuditCapture* capture);

}  // namespace certkv
