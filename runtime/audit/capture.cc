#include "runtime/audit/capture.h"

#include "runtime/certify/certificate.h"
#include "runtime/certify/selector.h"

namespace certkv {

void capture_head(const PassState& pass, int from, const CorrectionLog& corrections, int to,
                  AuditCapture* capture) {
  if (capture->heads.size() <= size_t(to)) capture->heads.resize(size_t(to) + 1);
  AuditCapture::Head& h = capture->heads[size_t(to)];
  const size_t n = pass.blocks, first = pass.at(from, 0);
  block_masses(pass, from, &h.mass);
  h.delta.assign(pass.delta.begin() + long(first), pass.delta.begin() + long(first + n));
  h.used.assign(pass.used.begin() + long(first), pass.used.begin() + long(first + n));
  h.eta.assign(n, 0.0f);
  h.corrections = uint32_t(corrections.count);
  capture->nu = pass.nu;
  for (size_t b = 0; b < n; ++b)
    if ((h.used[b] & kUsedValue) == 0) h.eta[b] = pass.eta[b];
}

}  // namespace certkv
