#include "tests/support/audited_case.h"

#include <cstring>
#include <fstream>
#include <iterator>

#include "runtime/audit/log.h"

namespace certkv {

AuditedRun run_audited(const AttentionCase& c, const std::string& folder, int broken_step,
                       int failed_step) {
  const auto format = std::make_shared<const PageFormat>(
      make_page_format(layout_by_name(c.layout), c.head_dim, c.block_tokens));
  HeadState state(DeviceTier(format, c.dtype, std::make_shared<TierAccount>()), c.key_quota,
                  c.value_quota);
  RowMaker maker(c);
  AuditedRun run;
  oracle::Originals& x = run.originals;
  x.dtype = c.dtype;
  x.head_dim = c.head_dim;
  MemoryOriginals originals(x, c.block_tokens);
  const size_t d = size_t(c.head_dim);

  AuditSetup setup;
  setup.folder = folder;
  setup.sample = 1;
  setup.model_files = "none";
  AuditLog log(setup, AuditShape{.layers = 1,
                                 .query_heads = c.heads,
                                 .kv_heads = 1,
                                 .heads = {0, 1},
                                 .dtype = c.dtype,
                                 .format = format.get()});
  maker.append(c.tokens, &x);
  state.tier.append(x.k.data(), x.v.data(), c.tokens, {});
  const uint32_t prompt = log.open_prompt(int64_t(c.seed), int64_t(c.tokens), c.steps);
  log.rows(prompt, 0, 0, c.tokens, x.k.data(), x.v.data());
  const uint32_t sequence = log.open_sequence(prompt, int64_t(c.tokens), c.steps, c.rules);
  log.close(prompt, c.tokens, false);

  std::vector<float> out(size_t(c.heads) * d);
  const uint32_t everyone = (1u << c.heads) - 1;
  for (int step = 0; step < c.steps; ++step) {
    const size_t before = x.tokens();
    maker.append(1, &x);
    const uint16_t *k = x.k.data() + before * d, *v = x.v.data() + before * d;
    state.tier.append(k, v, 1, {});
    originals.fail_all(step == failed_step ? BlockStatus::Corrupt : BlockStatus::Ok);
    const std::vector<float> q = maker.query();
    const AuditLog::Row row{sequence, x.tokens(), k, v};
    log.start_layer(uint64_t(step), 0, {&row, 1});
    const StepWhere where{
        .sequence = int64_t(c.seed), .step = x.tokens(), .audit = log.capture(sequence, 0)};
    GroupReport report;
    head_step(c.rules, where, c.heads, q.data(), &state, originals, out.data(), nullptr, &report);
    log.keep(sequence, 0, q.data(), out.data(), report);
    if (report.broken || step == broken_step || step == failed_step) {
      dense_step(where, c.heads, everyone, 4, q.data(), &state, originals, out.data(), nullptr,
                 &report);
      log.keep(sequence, 0, q.data(), out.data(), report);
    }
    log.end_step();
    run.steps.push_back(report);
    run.q.push_back(q);
    run.tokens.push_back(x.tokens());
  }
  log.close(sequence, x.tokens(), false);
  log.end();
  return run;
}

std::vector<AuditLink> read_links(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  std::vector<AuditLink> links;
  size_t at = 8;  // after the magic
  while (at + 48 <= bytes.size()) {
    uint32_t kind = 0;
    uint64_t n = 0;
    std::memcpy(&kind, bytes.data() + at, 4);
    std::memcpy(&n, bytes.data() + at + 8, 8);
    links.push_back({audit::LinkKind(kind), bytes.substr(at + 16, n)});
    at += 16 + n + 32;
  }
  return links;
}

void write_links(const std::string& path, const std::vector<AuditLink>& links) {
  audit::DigestChain chain;
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << "CKVAUDIT";
  for (const AuditLink& link : links) {
    std::string head(16, '\0');
    const auto kind = uint32_t(link.kind);
    const uint64_t n = link.payload.size();
    std::memcpy(head.data(), &kind, 4);
    std::memcpy(head.data() + 8, &n, 8);
    const audit::Digest& digest = chain.add(head, link.payload);
    out << head << link.payload;
    out.write(reinterpret_cast<const char*>(digest.data()), long(digest.size()));
  }
}

}  // namespace certkv
