// A device's forward pass: what its rows' steps say at their end, and rung 4 over several ranks.
//
// No collective can lie in a conditional node of a graph, so a step that rung 4 concerns is not
// changed on its way: it halts (kernels/cuda/model_args.h), which all ranks see in the same sum,
// and the hosts, who wait at its end anyway, go on from the layer where it did. SOURCE: method
// section 8.
#include <algorithm>

#include "runtime/device/device_transformer.h"

namespace certkv {

// What one rank saw alone (a key beyond the originals' range) all must know.
void DeviceTransformer::collect_faults(Buffers& b, size_t rows) {
  const uint32_t* from = b.fault.data();
  if (group_ != nullptr && ranks_ > 1) {
    group_->gather(b.fault.data(), b.faults.data() + b.halt_words, rows);
    from = b.faults.data();
  }
  device_.copy(b.host_faults.data(), from, (b.halt_words + ranks_ * rows) * sizeof(uint32_t));
}

uint32_t DeviceTransformer::fault_of(const Buffers& b, size_t rows, size_t row) const {
  uint32_t code = cuda::kNoFault;
  for (size_t r = 0; r < ranks_; ++r)
    code = std::min(code, b.host_faults[b.halt_words + r * rows + row]);
  return code;
}

void DeviceTransformer::wait_for_step() {
  cache_.end_rows();
  if (group_ != nullptr) group_->wait();
  device_.synchronize(Deadline::after(options_.deadline));
}

std::optional<size_t> DeviceTransformer::halted_layer() const {
  if (step_.halt_words == 0 || step_.host_faults[0] == 0) return std::nullopt;
  return step_.host_faults[0] - 1;
}

// Rows that no rank doubts have their sums of the layer's attention already.
void DeviceTransformer::repeat_from(size_t layer, size_t n, Wanted wanted,
                                    std::vector<int>* fallback_layers) {
  Buffers& b = step_;
  const uint32_t* own_faults = b.host_faults.data() + b.halt_words + rank_ * n;
  std::vector<uint32_t> repeated(n), fault(own_faults, own_faults + n);
  for (size_t r = 0; r < n; ++r) {
    repeated[r] = b.host_faults[1 + r];
    (*fallback_layers)[r] += int(repeated[r]);
    // Behind the halt nothing was a row's.
    if (fault[r] >= fault_code(layer + 1, LayerPart(0))) fault[r] = cuda::kNoFault;
  }
  device_.copy(repeated_.data(), repeated.data(), n * sizeof(uint32_t));
  device_.copy(b.fault.data(), fault.data(), n * sizeof(uint32_t));
  device_.fill(b.faults.data(), 0, b.halt_words * sizeof(uint32_t));

  cache_.decode_dense(int(layer), repeated_.data());
  project_output(layer, b, n, false);
  const bool last = layer + 1 == weights_.layers.size();
  finish_layer(layer, b, n, x_.data(), b.fault.data(),
               last ? &weights_.final_norm : &weights_.layers[layer + 1].input_norm,
               repeated_.data());
  enqueue_layers(layer + 1, n, wanted);
  wait_for_step();
}

}  // namespace certkv
