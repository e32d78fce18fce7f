// Running the device's pass, on the device or in emulation, and reading what it left.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/attend.h"
#include "kernels/cuda/pass_args.h"
#include "kernels/cuda/plan.h"

namespace certkv::cuda {

struct PassShape {
  int head_dim = 0;
  int heads = 0;  // most query heads of any item; 1 to 8
  int items = 0;
  int splits = 0;                  // of the longest item, or so many from PassArgs::first_split on
  int warps = 0;                   // of a block, as pass_warps() says of the device
  PageKind kind = PageKind::K8V4;  // of every page with codes
  bool certificate = true;
  bool merge = true;  // false: splits alone; a later pass over the rest merges all
  int groups() const { return (heads + 3) / 4; }
};

// Throws InvalidArgument for a shape that is not supported.
void check_shape(const PassArgs& args, const PassShape& shape);

// The pass and its merge on the CPU, lane by lane. args.items and all it points to: host memory.
// Throws std::logic_error where a kernel breaks a rule of the device (an access not aligned, a copy
// not waited for).
void attend_emulated(const PassArgs& args, const PassShape& shape);
// Who emulates the shapes that no cache on an emulated device asks for, without certificates or of
// few warps; until then they are refused (InvalidArgument). Before the first pass.
using PassEmulation = void (*)(const PassArgs& args, const PassShape& shape);
void emulate_others_by(PassEmulation emulation);

// What one item of a pass has left, in host memory, and the notes of its blocks as the device
// serves them.
struct PassOutput {
  int heads = 0, head_dim = 0, groups = 1;
  size_t blocks = 0, tokens = 0;
  bool certificate = true;
  float unit = 1;
  std::span<const uint32_t> place;       // [blocks] 4 times its entry, and its tile
  std::span<const float> records;        // [pages, groups, kRecordFloats]
  std::span<const uint8_t> used;         // [pages, 4]
  std::span<const double> merged;        // [heads, sums_floats(head_dim)]
  std::span<const float> nu, eta, vbar;  // [blocks]; without codes: nu, 0, nu
};

// The same as a pass of the CPU backend leaves, so that certificates are closed and judged by the
// same code.
void read_state(const PassOutput& output, PassState* state);

}  // namespace certkv::cuda
