#include "kernels/layout.h"

#include <algorithm>
#include <array>
#include <string>

#include "kernels/base/error.h"

namespace certkv {
namespace {

constexpr std::array<Layout, 7> kLayouts = {{
    {.name = "compact",
     .key = {.code_bits = 8, .metadata = DType::F16},
     .value = {.code_bits = 4, .metadata = DType::F16},
     .key_group_tokens = 64,
     .value_group_elements = 16},
    {.name = "balanced",
     .key = {.code_bits = 8, .metadata = DType::F16},
     .value = {.code_bits = 8, .metadata = DType::F16},
     .key_group_tokens = 64,
     .value_group_elements = 64},
    {.name = "paper",
     .key = {.code_bits = 8, .metadata = DType::F32},
     .value = {.code_bits = 4, .metadata = DType::F16},
     .key_group_tokens = 16,
     .value_group_elements = 16},
    {.name = "k8v4",
     .key = {.code_bits = 8, .metadata = DType::F16},
     .value = {.code_bits = 4, .metadata = DType::F16},
     .key_group_tokens = 64,
     .value_group_elements = 16},
    {.name = "k8v8",
     .key = {.code_bits = 8, .metadata = DType::F16},
     .value = {.code_bits = 8, .metadata = DType::F16},
     .key_group_tokens = 64,
     .value_group_elements = 64},
    {.name = "k12v8",
     .key = {.code_bits = 12, .residual_bits = 4, .read_residual = true, .metadata = DType::F16},
     .value = {.code_bits = 8, .metadata = DType::F16},
     .key_group_tokens = 64,
     .value_group_elements = 64},
    {.name = "k12v8split",
     .key = {.code_bits = 12, .residual_bits = 4, .read_residual = true, .metadata = DType::F16},
     .value = {.code_bits = 8, .residual_bits = 4, .read_residual = true, .metadata = DType::F16},
     .key_group_tokens = 64,
     .value_group_elements = 16},
}};

// Cheapest first. Re-encoding goes back to the originals, so the classes need share neither scales
// nor planes: each has the value groups that suit its own bits.
constexpr std::array<std::string_view, 3> kClassNames = {"k8v4", "k8v8", "k12v8"};

size_t align64(size_t x) {
  return (x + 63) / 64 * 64;
}

}  // namespace

std::span<const Layout> layouts() {
  return kLayouts;
}

std::span<const std::string_view> class_layouts() {
  return kClassNames;
}

const Layout& layout_by_name(std::string_view name) {
  std::string known;
  for (const Layout& l : kLayouts) {
    if (l.name == name) return l;
    known += (known.empty() ? "" : ", ") + std::string(l.name);
  }
  CERTKV_THROW(InvalidArgument, "cache.layout is '{}': known layouts are {}", name, known);
}

PageFormat make_page_format(const Layout& layout, int head_dim, int block_tokens) {
  CERTKV_EXPECT(head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256,
                InvalidArgument, "head_dim is {}: supported are 64, 96, 128 and 256", head_dim);
  CERTKV_EXPECT(block_tokens == 16 || block_tokens == 32, InvalidArgument,
                "cache.block_tokens is {}: supported are 16 and 32", block_tokens);
  PageFormat f;
  f.layout = layout;
  f.head_dim = head_dim;
  f.block_tokens = block_tokens;
  f.group_tokens = std::max(layout.key_group_tokens, block_tokens);
  // The largest divisor of head_dim up to the wished size; a tile of 16 elements must lie in one
  // group, which every supported head_dim allows.
  f.value_group = std::min(layout.value_group_elements, head_dim);
  while (head_dim % f.value_group != 0 || f.value_group % 16 != 0) --f.value_group;
  f.value_groups = head_dim / f.value_group;

  const size_t d = size_t(head_dim), n = size_t(f.group_tokens);
  size_t at = 0, payload = 0;
  const auto section = [&](size_t& offset, size_t bytes) {
    offset = at;
    payload += bytes;
    at = align64(at + bytes);
  };
  // In the order of their use: a pass fetches what comes before value_base while it works on the
  // page before, and the rest while it scores this one.
  section(f.annotations, size_t(f.blocks()) * sizeof(BlockAnnotations) + sizeof(PageNotes));
  f.notes = f.annotations + size_t(f.blocks()) * sizeof(BlockAnnotations);
  section(f.key_scale, d * dtype_bytes(layout.key.metadata));
  section(f.key_offset, d * dtype_bytes(layout.key.metadata));
  section(f.key_base, n * d);
  section(f.key_residual, layout.key.residual_bits > 0 ? n * d / 2 : 0);
  section(f.value_base, n * d * size_t(layout.value.base_bits()) / 8);
  section(f.value_residual, layout.value.residual_bits > 0 ? n * d / 2 : 0);
  section(f.value_scale, n * size_t(f.value_groups) * dtype_bytes(layout.value.metadata));
  section(f.value_offset, n * size_t(f.value_groups) * dtype_bytes(layout.value.metadata));
  section(f.value_norms, n * sizeof(uint16_t));
  f.page_bytes = at;
  f.payload_bytes = payload;
  return f;
}

}  // namespace certkv
