// One layer's attention at one step, as a bench runs it: originals, tier 1 and scratch of every KV
// head, in memory of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/bench/synthetic_heads.h"
#include "runtime/certify/head_step.h"

namespace certkv {

// Originals of one KV head in plain memory. `verify`: the digest of every payload is checked when
// it is read, as a job's reader does (kvstore/arena_reader.cc); without it reading a view costs
// nothing.
class BenchOriginals : public HeadOriginals {
 public:
  BenchOriginals(std::vector<uint16_t> k, std::vector<uint16_t> v, int block_tokens, int head_dim);
  void read(std::span<const uint32_t> blocks, std::span<const Destination> destinations,
            std::vector<BlockResult>* results) override;
  void set_verify(bool verify) { verify_ = verify; }
  const uint16_t* k() const { return k_.data(); }
  const uint16_t* v() const { return v_.data(); }

 private:
  std::vector<uint16_t> k_, v_;  // [tokens, head_dim]
  size_t block_elements_;
  int block_tokens_;
  bool verify_ = true;
  std::vector<uint64_t> k_digest_, v_digest_;  // [whole blocks]
};

struct BenchHead {
  BenchOriginals originals;
  HeadState sealed;  // stepped densely alone, which leaves it as it is: forks start here
  HeadState budget, paper, naive;  // stepped under these policies, each with its own scratch
  GroupReport report;              // of the last step
  std::vector<float> out;          // [query_heads, head_dim] of the last step
  PassState pass;
};

struct BenchLayer {
  std::vector<std::unique_ptr<BenchHead>> heads;  // [batch, kv_heads]
};

// A layer with copies of these heads. quota: scratch blocks of keys, and of values, per KV head.
BenchLayer make_bench_layer(std::shared_ptr<const PageFormat> format, DType dtype,
                            std::span<const SyntheticHead> heads, size_t key_quota,
                            size_t value_quota);

// Bytes that attention reads of one KV head: tokens as originals, or as tier 1 holds them with
// f_blocks keys and x_blocks values from originals instead of codes.
double dense_read_bytes(const PageFormat& format, size_t tokens);
double certified_read_bytes(const HeadState& state, double f_blocks, double x_blocks);
// Of the values of so many quantised blocks: codes and metadata.
double value_plane_bytes(const PageFormat& format, double blocks);

}  // namespace certkv
