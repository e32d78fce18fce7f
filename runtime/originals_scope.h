// What decides the bits of a prompt's originals, as digests: where two jobs agree on all of it, and
// on the tokens, their originals are the same bytes and may be shared (store.reuse).
//
// On the CPU backend a segment's originals are made from products of fixed shapes, in an order that
// neither threads, nor neighbours in the batch, nor what follows in the prompt changes. What does
// change bits: weights (and their quantisation), the model's configuration, the dtype of originals,
// `deterministic`, the instruction sets that the kernels and OpenBLAS chose, and, without
// `deterministic`, the number of ranks that sums are spread over. All of that is in the digest, so
// jobs that differ in it never share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kvstore/content_owner.h"
#include "parallel/topology.h"
#include "runtime/model_config.h"
#include "runtime/options.h"

namespace certkv {

class Communicator;

// Raised whenever a change of the forward pass may change a bit of originals.
inline constexpr int kOriginalsRevision = 1;

// Whether this job shares originals: store.reuse, auto meaning where the backend can.
// Throws InvalidArgument where it is asked for and the backend cannot.
bool shares_originals(const JobOptions& options);

// SHA-256 over names, sizes and every byte of a model folder's files (json, safetensors, model);
// the ranks of a node share the work. Collective over `world`. Nothing where the nodes' folders
// differ: then no two nodes' originals belong together. ERRORS: BadFile.
std::optional<Sha256> digest_model(const std::string& folder, Communicator& world,
                                   const Topology& topology);

// tensor: ranks of a group.
ContentScope originals_scope(const JobOptions& options, const ModelConfig& config, int tensor,
                             DType dtype, const Sha256& model);

// The scope in one word, for records that are compared with this very program's own.
uint64_t scope_word(const ContentScope& scope);

}  // namespace certkv
