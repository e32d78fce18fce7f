// A rank's weights in a device's memory, in the form in which its products take them: the tiles of
// runtime/weights.h joined, so that a layer has one product of each kind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cuda/device.h"

namespace certkv {

struct ModelConfig;
struct Weights;

// Row-major [out, in], in the type of DeviceWeights, or INT8 codes where there are scales.
struct DeviceMatrix {
  cuda::DeviceArray<std::byte> values;
  size_t out = 0, in = 0;
  cuda::DeviceArray<float> scales = {};  // [out], or empty
};

// H = hidden, d = head_dim; h, g, I, V: this rank's query heads, KV heads, part of the MLP and of
// the vocabulary.
struct DeviceLayer {
  DeviceMatrix qkv;      // [(h + 2 g) d, H]: queries, keys, values
  DeviceMatrix o;        // [H, h d]
  DeviceMatrix gate_up;  // [2 I, H]: gates, then ups
  DeviceMatrix down;     // [H, I]
  cuda::DeviceArray<float> input_norm, post_attention_norm;            // [H]
  cuda::DeviceArray<float> q_norm, k_norm;                             // [d], or empty
  cuda::DeviceArray<float> qkv_bias, o_bias, gate_up_bias, down_bias;  // or empty
};

struct DeviceWeights {
  DeviceWeights() = default;  // none
  // Uploads what `weights` holds; they are not needed afterwards. Matrices are rounded to `dtype`
  // (F32, F16 or BF16), which changes nothing where the model's files have that type; INT8 ones
  // keep their codes and scales; norms and biases stay float, the embedding stays what it is.
  // ERRORS: InvalidArgument (another type; a value that dtype cannot hold), OutOfMemory naming the
  // matrix.
  DeviceWeights(const ModelConfig& config, const Weights& weights, cuda::Device& device,
                DType dtype);

  // Copies the last layer until there are `count`: random weights, to measure with.
  void repeat_last_layer(cuda::Device& device, size_t count);

  // Device memory that the constructor will allocate. UNITS: bytes
  static uint64_t bytes(const ModelConfig& config, const Weights& weights, DType dtype);

  DType dtype = DType::BF16;
  bool int8 = false;  // the layers' matrices; dtype is then that of their inputs
  DType embed_dtype = DType::BF16;
  cuda::DeviceArray<std::byte> embed;  // [vocab, H]
  std::vector<DeviceLayer> layers;
  cuda::DeviceArray<float> final_norm;  // [H]
  DeviceMatrix lm_head;                 // [V, H]; no values where the embedding is used
  const void* lm_head_values() const;
  size_t vocab_rows = 0;  // V
};

}  // namespace certkv
