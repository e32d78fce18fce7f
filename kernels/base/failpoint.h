// Named places where a fault can be asked for: a death, an error, a delay, flipped bits, a NaN.
//
// They exist in builds with CERTKV_FAILPOINTS (the presets cpu, asan and tsan) and nowhere else;
// the macros are then empty. One that nobody has set costs a relaxed load and a branch that is not
// taken, so none may stand in an inner loop. kernels/base/failpoints.inc lists all of them.
//
//   CERTKV_FAILPOINT='holder.allocate=panic,skip=2;client.send=corrupt,probability=0.1,seed=7'
//
// in the environment sets them at the start of the process (and of every store it starts), which
// ends with 2 where that text is wrong: a fault that is misspelt must not pass for one survived.
//   panic        SIGKILL of this process            sleep:MS   that long, then on
//   error:KIND   throws that ErrorKind              corrupt    flips one bit of what is there
//   force        takes the branch that is named     nan        four bytes become 0xff
//   skip=N passes the first N hits, count=N ends after N times, probability=P draws each hit from
//   seed=S, rank=R is for that rank of mpirun or srun alone.
// CERTKV_FAILPOINT_LOG=FILE: one line per fault, so that whoever asked can see that it happened.
#pragma once

#ifndef CERTKV_FAILPOINTS
#define CERTKV_FAILPOINTS 0
#endif

#if CERTKV_FAILPOINTS

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace certkv::failpoint {

enum class Point : uint16_t {
#define CERTKV_FAILPOINT_ROW(point, actions, holds) point,
#include "kernels/base/failpoints.inc"
#undef CERTKV_FAILPOINT_ROW
  kCount
};

struct Row {
  std::string name;  // the point's, with a dot after its layer: holder.allocate
  const char* actions;
  const char* holds;  // what must hold whatever happens here
};
std::span<const Row> table();

// THREADS: all may be called from any thread; a point under way keeps what it was set to.
void set(std::string_view text);  // adds to what is set; InvalidArgument says what is wrong
void clear();
uint64_t fired(std::string_view name);  // faults there since it was last set

extern std::array<std::atomic<uint32_t>, size_t(Point::kCount)> armed;

// Only for points that are set. True where bytes are to be changed, or the branch taken.
bool fire(Point point);
void change(Point point, void* bytes, size_t count);

inline bool is_set(Point point) {
  return armed[size_t(point)].load(std::memory_order_relaxed) != 0;
}

}  // namespace certkv::failpoint

#define CERTKV_FAILPOINT(point)                                                      \
  do {                                                                               \
    if (::certkv::failpoint::is_set(::certkv::failpoint::Point::point)) [[unlikely]] \
      ::certkv::failpoint::fire(::certkv::failpoint::Point::point);                  \
  } while (false)
// Also `corrupt` and `nan`, in `count` bytes at `bytes`.
#define CERTKV_FAILPOINT_BYTES(point, bytes, count)                                  \
  do {                                                                               \
    if (::certkv::failpoint::is_set(::certkv::failpoint::Point::point)) [[unlikely]] \
      ::certkv::failpoint::change(::certkv::failpoint::Point::point, bytes, count);  \
  } while (false)
// A condition: true where `force` is asked for.
#define CERTKV_FAILPOINT_FORCED(point)                               \
  (::certkv::failpoint::is_set(::certkv::failpoint::Point::point) && \
   ::certkv::failpoint::fire(::certkv::failpoint::Point::point))

#else

#define CERTKV_FAILPOINT(point) static_cast<void>(0)
#define CERTKV_FAILPOINT_BYTES(point, bytes, count) static_cast<void>(0)
#define CERTKV_FAILPOINT_FORCED(point) false

#endif
