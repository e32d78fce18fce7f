#include "runtime/audit/capture.h"

#include <algorithm>

#include "kernels/quantize.h"
#include "runtime/certify/certificate.h"
#include "runtime/certify/selector.h"

namespace certkv {

void capture_head(const AttendContext& context, const PassState& pass, int from,
                  std::span<const BlockRef> blocks, const CorrectionLog& corrections, int to,
                  AuditCapture* capture) {
  if (capture->heads.size() <= size_t(to)) capture->heads.resize(size_t(to) + 1);
  AuditCapture::Head& h = capture->heads[size_t(to)];
  const size_t n = pass.blocks, first = pass.at(from, 0);
  block_masses(pass, from, &h.mass);
  h.delta.assign(pass.delta.begin() + long(first), pass.delta.begin() + long(first + n));
  h.used.assign(pass.used.begin() + long(first), pass.used.begin() + long(first + n));
  h.eta.assign(n, 0.0f);
  h.corrections = uint32_t(corrections.count);
  capture->centre = pass.r;
  capture->nu.resize(n);
  for (size_t b = 0; b < n; ++b) {
    capture->nu[b] = blocks[b].nu;
    if ((h.used[b] & kUsedValue) == 0)
      h.eta[b] = page_annotations(*context.format, blocks[b].page, blocks[b].index).eta;
  }
}

}  // namespace certkv
