// The device's KV cache as its forward pass sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "kernels/base/error.h"

namespace certkv {

class DeviceAttention {
 public:
  virtual ~DeviceAttention() = default;
  // Rows [0, rows) of a prompt's layer, as store_prefill() will have them, are complete once what
  // has been enqueued so far is done: they may be taken from now on, beside what follows, and must
  // stay until store_prefill() of that layer has returned or, where there will be none, until
  // cuda::Device::settle().
  virtual void take_rows(int64_t /*sequence*/, int /*layer*/, size_t /*rows*/,
                         const uint16_t* /*k*/, const uint16_t* /*v*/, size_t /*head_stride*/) {}
  // As KvAttention::store_prefill, of the device's memory: rows [tokens, head_dim] of 16-bit
  // originals after RoPE, KV head h's from h head_stride elements on, 16-byte aligned. What is
  // enqueued reads them; they may change behind it in the stream. last_q: host memory.
  virtual void store_prefill(int64_t sequence, int layer, size_t tokens, const uint16_t* k,
                             const uint16_t* v, size_t head_stride,
                             std::span<const float> last_q) = 0;
  // The step's rows, before the first layer: row r of every later call belongs to sequences[r].
  // out: device [rows, heads * head_dim] float, what every layer writes; the same memory while a
  // captured step is launched again.
  virtual void begin_rows(std::span<const int64_t> sequences, float* out) = 0;
  // How ranks agree on rung 4 (method section 8), which a cache of several ranks leaves to its
  // caller: all ranks then call decode_dense(). Words of the device, for as long as its steps.
  struct Agreement {
    // [rows] 0 when a layer begins; not 0 behind decode(): a precondition broke, the row's outputs
    // are unspecified. Summed over the ranks beside the layer's outputs.
    float* fallback = nullptr;
    // 0, or the layer + 1 at which the step has halted: of what is enqueued of later layers nothing
    // must reach the sequences; the step goes on from there, layer by layer, once more.
    const uint32_t* halted = nullptr;
  };
  // Before begin_rows(), the same for the same number of rows; {}: one rank, where the cache goes
  // dense by itself.
  virtual void agree_through(const Agreement&) {}
  // What is done with a layer's outputs, if the cache shall enqueue it: at once, while the device
  // still decides whether the ladder must act, and in that case once more, with `again`, from the
  // outputs that count. The two may be done at the same time, so they share no memory that either
  // writes. `redone`: a word of the device, 0 after decode() or, once the second has been done,
  // not 0.
  struct Following {
    std::function<void(bool again)> enqueue;  // empty: the caller goes on behind decode()
    uint32_t* redone = nullptr;
  };
  // Enqueued on the device's stream. qkv: device [rows, (heads + 2 kv_heads) * head_dim] float,
  // after norms and RoPE: queries of all local heads (head = kv_head * heads_per_group + j), then
  // keys, then values, not yet rounded. What is enqueued next finds the outputs, and what
  // `following` made of them.
  virtual void decode(int layer, const float* qkv, const Following& following) = 0;
  // Rung 4: repeats a layer's attention over originals for the rows whose word (of the device) is
  // not 0; outputs of the others are unspecified. The token has been appended, and later layers are
  // as they were before the step. The step is not captured from here on, and end_rows() is called
  // again. For a cache that raises no flags: an error.
  virtual void decode_dense(int layer, const uint32_t* /*rows*/) {
    CERTKV_THROW(InvalidArgument, "layer {}: rung 4 of a cache that never asks for it", layer);
  }
  // After the last layer: enqueues what the step's end reads of the device, outside of what is
  // captured, so that one wait serves the step and its end.
  virtual void end_rows() {}
  // Of the rows under way: what decode() has enqueued for every layer at a step of the same shape
  // may be enqueued again as it was (cuda::Device::capture), for it reads what differs from the
  // device's memory.
  virtual uint64_t shape() const = 0;
};

}  // namespace certkv
