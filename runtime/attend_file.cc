#include "runtime/attend_file.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/base/error.h"
#include "runtime/certify/head_step.h"
#include "runtime/safetensors.h"

namespace certkv {
namespace {

// Originals that lie in this process.
class MemoryOriginals : public HeadOriginals {
 public:
  MemoryOriginals(const uint16_t* k, const uint16_t* v, size_t block_elements)
      : k_(k), v_(v), n_(block_elements) {}
  void read(std::span<const uint32_t> blocks, std::span<const Destination> destinations,
            std::vector<BlockResult>* results) override {
    results->assign(blocks.size(), {});
    for (size_t i = 0; i < blocks.size(); ++i) {
      BlockResult& r = (*results)[i];
      const Destination& to = destinations[i];
      const auto give = [&](const uint16_t* from, uint16_t* buffer) -> const uint16_t* {
        if (to.view) return from;
        std::copy_n(from, n_, buffer);
        return buffer;
      };
      if (wants_k(to.part)) r.k = give(k_ + blocks[i] * n_, to.k);
      if (wants_v(to.part)) r.v = give(v_ + blocks[i] * n_, to.v);
      r.status = BlockStatus::Ok;
    }
  }

 private:
  const uint16_t *k_, *v_;
  size_t n_;
};

struct Inputs {
  int64_t query_heads = 0, kv_heads = 0, tokens = 0, d = 0;
  DType dtype = DType::BF16;
  std::vector<float> q;
  std::vector<uint16_t> k, v;  // [kv_heads, tokens, d]
};

void check_float_type(const SafetensorsFile& file, const TensorEntry& t) {
  CERTKV_EXPECT(t.dtype == DType::F16 || t.dtype == DType::BF16 || t.dtype == DType::F32, BadFile,
                "{}: tensor {} is {}: F16, BF16 or F32 is needed", file.path(), t.name,
                dtype_name(t.dtype));
}

std::vector<uint16_t> load_originals(const SafetensorsFile& file, const TensorEntry& t,
                                     DType dtype) {
  std::vector<uint16_t> out(t.elements);
  if (t.dtype == dtype) {
    file.read_raw(t, 0, t.elements, out.data());
  } else {
    std::vector<float> wide(t.elements);
    file.read_float(t, 0, t.elements, wide.data());
    for (size_t i = 0; i < out.size(); ++i) out[i] = float_to_16(dtype, wide[i]);
  }
  for (size_t i = 0; i < out.size(); ++i)
    CERTKV_EXPECT(std::isfinite(float_from_16(dtype, out[i])), NonFinite,
                  "{}: tensor {} is NaN or infinite as {} at element {}", file.path(), t.name,
                  dtype_name(dtype), i);
  return out;
}

Inputs load_inputs(const AttendFileOptions& options) {
  const SafetensorsFile file(options.input);
  const TensorEntry &q = file.tensor("q"), &k = file.tensor("k"), &v = file.tensor("v");
  for (const TensorEntry* t : {&q, &k, &v}) check_float_type(file, *t);
  CERTKV_EXPECT(q.shape.size() == 2 && q.elements > 0, BadFile,
                "{}: q is {}: [query_heads, head_dim] is needed", file.path(), shape_text(q.shape));
  CERTKV_EXPECT(k.shape.size() == 3 && k.elements > 0, BadFile,
                "{}: k is {}: [kv_heads, tokens, head_dim] is needed", file.path(),
                shape_text(k.shape));
  CERTKV_EXPECT(v.shape == k.shape, BadFile, "{}: v is {}, k is {}: they must be alike", file.path(),
                shape_text(v.shape), shape_text(k.shape));
  CERTKV_EXPECT(k.dtype == v.dtype, BadFile, "{}: k is {}, v is {}: they must be of one type",
                file.path(), dtype_name(k.dtype), dtype_name(v.dtype));
  Inputs in;
  in.query_heads = q.shape[0];
  in.d = q.shape[1];
  in.kv_heads = k.shape[0];
  in.tokens = k.shape[1];
  CERTKV_EXPECT(k.shape[2] == in.d, BadFile, "{}: q has head_dim {}, k has {}", file.path(), in.d,
                k.shape[2]);
  CERTKV_EXPECT(in.query_heads % in.kv_heads == 0, BadFile,
                "{}: {} query heads cannot share {} KV heads evenly", file.path(), in.query_heads,
                in.kv_heads);
  in.dtype = k.dtype == DType::F32 ? options.dtype : k.dtype;
  in.q.resize(q.elements);
  file.read_float(q, 0, q.elements, in.q.data());
  for (size_t i = 0; i < in.q.size(); ++i) {
    if (q.dtype == DType::F32)
      in.q[i] = float_from_16(in.dtype, float_to_16(in.dtype, in.q[i]));
    CERTKV_EXPECT(std::isfinite(in.q[i]), NonFinite, "{}: q is NaN or infinite at element {}",
                  file.path(), i);
  }
  in.k = load_originals(file, k, in.dtype);
  in.v = load_originals(file, v, in.dtype);
  return in;
}

struct Outputs {
  std::vector<float> o, block_log_mass;
  std::vector<double> bound, e_key, e_val, e_fp, e_key_paper, relative, candidate_bound;
  std::vector<uint8_t> outcome, rung;
  std::vector<int64_t> promoted_keys, promoted_values;

  void add(const HeadReport& r) {
    bound.push_back(r.returned.bound);
    e_key.push_back(r.returned.e_key);
    e_val.push_back(r.returned.e_val);
    e_fp.push_back(r.returned.e_fp);
    e_key_paper.push_back(r.returned.e_key_paper);
    relative.push_back(r.returned.relative);
    candidate_bound.push_back(r.candidate.bound);
    outcome.push_back(uint8_t(r.outcome));
    rung.push_back(uint8_t(r.rung));
    promoted_keys.push_back(r.promoted_keys);
    promoted_values.push_back(r.promoted_values);
  }
  void write(const std::filesystem::path& path, int64_t heads, int64_t d, int64_t blocks) const {
    const std::vector<int64_t> one = {heads};
    const std::vector<TensorToWrite> tensors = {
        {"o", DType::F32, {heads, d}, o.data()},
        {"bound", DType::F64, one, bound.data()},
        {"e_key", DType::F64, one, e_key.data()},
        {"e_val", DType::F64, one, e_val.data()},
        {"e_fp", DType::F64, one, e_fp.data()},
        {"e_key_paper", DType::F64, one, e_key_paper.data()},
        {"relative", DType::F64, one, relative.data()},
        {"candidate_bound", DType::F64, one, candidate_bound.data()},
        {"outcome", DType::U8, one, outcome.data()},
        {"rung", DType::U8, one, rung.data()},
        {"promoted_keys", DType::I64, one, promoted_keys.data()},
        {"promoted_values", DType::I64, one, promoted_values.data()},
        {"block_log_mass", DType::F32, {heads, blocks}, block_log_mass.data()},
    };
    write_safetensors(path, tensors);
  }
};

}  // namespace

AttendFileResult attend_file(const AttendFileOptions& options) {
  const Inputs in = load_inputs(options);
  CERTKV_EXPECT(in.query_heads / in.kv_heads <= kMaxGroupHeads, InvalidArgument,
                "{} query heads share a KV head: at most {} are supported",
                in.query_heads / in.kv_heads, kMaxGroupHeads);
  CERTKV_EXPECT(options.cache.layout != kClassesLayout, InvalidArgument,
                "cache.layout is 'classes': certkv attend sees one step, classes are chosen and "
                "revised over many; name one of k8v4, k8v8 and k12v8");
  const auto format = std::make_shared<const PageFormat>(make_page_format(
      layout_by_name(options.cache.layout), int(in.d), options.cache.block_tokens));
  const auto account = std::make_shared<TierAccount>();
  const StepRules rules{.policy = options.policy,
                        .tolerance = options.tolerance,
                        .paper = options.paper,
                        .ladder = options.ladder,
                        .skip = {},  // one step has no earlier one to guess from
                        .exploration_seed = options.seed};
  const size_t group = size_t(in.query_heads / in.kv_heads), d = size_t(in.d);
  const size_t rows = size_t(in.tokens) * d;
  const size_t block_elements = size_t(options.cache.block_tokens) * d;
  const size_t blocks = (size_t(in.tokens) + size_t(options.cache.block_tokens) - 1) /
                        size_t(options.cache.block_tokens);
  Outputs out;
  out.o.resize(size_t(in.query_heads) * d);
  out.block_log_mass.assign(size_t(in.query_heads) * blocks,
                            std::numeric_limits<float>::quiet_NaN());
  AttendFileResult result;
  for (size_t g = 0; g < size_t(in.kv_heads); ++g) {
    const uint16_t *k = in.k.data() + g * rows, *v = in.v.data() + g * rows;
    HeadState state(DeviceTier(format, in.dtype, account), blocks, blocks);
    state.tier.append(k, v, size_t(in.tokens), {});
    MemoryOriginals originals(k, v, block_elements);
    const StepWhere where{0, 0, int(g), 0};
    const float* q = in.q.data() + g * group * d;
    float* o = out.o.data() + g * group * d;
    float* masses = out.block_log_mass.data() + g * group * blocks;
    GroupReport report;
    head_step(rules, where, int(group), q, &state, originals, o, masses, &report);
    if (report.broken)
      dense_step(where, int(group), (1u << group) - 1, 4, q, &state, originals, o, nullptr,
                 &report);
    for (const HeadReport& r : report.heads) {
      out.add(r);
      ++result.outcomes[size_t(r.outcome)];
      ++result.rungs[size_t(r.rung)];
      const auto raise = [](double& largest, double x) {  // keeps NaN
        if (!(x <= largest) && largest == largest) largest = x;
      };
      raise(result.bound_max, r.returned.bound);
      raise(result.relative_max, r.returned.relative);
    }
  }
  out.write(options.output, in.query_heads, in.d, int64_t(blocks));
  result.bytes_per_token = format->bytes_per_token();
  result.tokens = in.tokens;
  result.query_heads = in.query_heads;
  result.kv_heads = in.kv_heads;
  result.head_dim = in.d;
  return result;
}

}  // namespace certkv
