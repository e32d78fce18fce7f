#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/base/log.h"
#include "runtime/audit/capture.h"
#include "runtime/certify/head_step.h"
#include "runtime/certify/selector.h"

namespace certkv {

void dense_step(const StepWhere& where, int heads, uint32_t mask, int rung, const float* q,
                HeadState* state, HeadOriginals& originals, float* out, float* block_log_mass_out,
                GroupReport* report) {
  const int d = state->tier.format().head_dim;
  const AttendContext context{&state->tier.format(), state->tier.dtype()};
  report->heads.resize(size_t(heads));

  // Verified views of every quantised block; the others are served from originals anyway.
  std::vector<BlockRef> refs(state->tier.blocks().begin(), state->tier.blocks().end());
  std::vector<uint32_t> wanted;
  for (uint32_t b = 0; b < refs.size(); ++b)
    if (refs[b].page != nullptr) wanted.push_back(b);
  std::vector<Destination> destinations(wanted.size(), {.part = BlockPart::Both, .view = true});
  std::vector<BlockResult> results;
  originals.read(wanted, destinations, &results);
  bool have_all = results.size() == wanted.size();
  for (size_t i = 0; have_all && i < wanted.size(); ++i) {
    if (results[i].status != BlockStatus::Ok) {
      have_all = false;
      ++report->digest;
      log_error("sequence {} layer {} KV head {} block {}: originals are {} and no copy is left",
                where.sequence, where.layer, where.kv_head, wanted[i],
                block_status_name(results[i].status));
      break;
    }
    BlockRef& ref = refs[wanted[i]];
    ref.page = nullptr;
    ref.k = results[i].k;
    ref.v = results[i].v;
  }

  std::vector<int> chosen;
  for (int h = 0; h < heads; ++h)
    if ((mask >> h & 1) != 0) chosen.push_back(h);
  std::vector<float> chosen_q;
  for (int h : chosen) chosen_q.insert(chosen_q.end(), q + h * d, q + (h + 1) * d);
  PassState pass;
  if (have_all) {
    const QueryGroup group = make_query_group(int(chosen.size()), d, chosen_q.data());
    attend_pass(context, group, refs, state->centre.data(), &pass);
  }
  for (size_t i = 0; i < chosen.size(); ++i) {
    HeadReport& r = report->heads[size_t(chosen[i])];
    float* o = out + chosen[i] * d;
    r.rung = std::max(r.rung, rung);
    r.outcome = Outcome::Failed;
    if (have_all) {
      finish_output(pass, int(i), o);
      if (block_log_mass_out != nullptr)
        for (size_t b = 0; b < pass.blocks; ++b)
          block_log_mass_out[size_t(chosen[i]) * pass.blocks + b] =
              float(block_log_mass(pass, int(i), b));
      r.returned = certify(context, pass, int(i), refs, {}, o);
      if (where.audit != nullptr)
        capture_head(context, pass, int(i), refs, {}, chosen[i], where.audit);
      // `exact` needs verified originals, a finite output and a stated rounding bound.
      if (std::isfinite(r.returned.bound)) r.outcome = Outcome::Exact;
    }
    if (r.outcome == Outcome::Failed) {
      r.returned = {};
      r.returned.bound = r.returned.relative = std::nan("");
      std::fill_n(o, d, 0.0f);
    }
  }
}

}  // namespace certkv
