// From options to an engine: model, weights, tokenizer, the node's store, in the order in which
// things that can fail cheaply fail first.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "parallel/topology.h"
#include "runtime/chat_template.h"
#include "runtime/engine.h"
#include "runtime/model_config.h"

namespace certkv {

class Communicator;
class StoreClient;
class Tokenizer;
struct Weights;

// A model folder without its weights: all that is needed to read a batch.
struct LoadedModel {
  std::shared_ptr<const ModelConfig> config;
  std::shared_ptr<const Tokenizer> tokenizer;
  ChatTemplate chat{ChatTemplate::Style::Unknown};
  int64_t token_limit = 0;  // of prompt + answer
};
// ERRORS: BadFile, InvalidArgument (unsupported kind; parallel.tensor does not divide, for
// tensor > 0).
LoadedModel load_model(const JobOptions& options, int tensor);

// Where the job's audit goes: audit.folder, or audit/ in run.output.
std::string audit_folder(const JobOptions& options);

// Sizes of a request, for sizing the arena.
struct RequestShape {
  int64_t prompt_tokens = 0, max_tokens = 0;
  int forks = 1;  // policies it is decoded under
};

// Bytes of originals that a node of `local_ranks` ranks holds at most, when the max_batch largest
// of these requests run in every replica at once. UNITS: bytes
uint64_t arena_demand(const JobOptions& options, const ModelConfig& config, int tensor,
                      int local_ranks, std::span<const RequestShape> requests);

// Everything a rank decodes with. Members are destroyed in reverse order: the engine first.
struct EngineSetup {
  std::shared_ptr<StoreClient> store;
  std::unique_ptr<Engine> engine;
};

// Collective over `world`; `group` is this rank's tensor-parallel group.
// arena_bytes: the node's need under store.arena = auto (the same on all ranks of a node).
// Loads the weights after checking that they fit, starts or attaches to the node's store.
// device_control: as in EngineParts; may be empty.
EngineSetup set_up_engine(
    const JobOptions& options, const LoadedModel& model, Communicator& world, Communicator& group,
    const Topology& topology, uint64_t arena_bytes,
    const std::function<std::unique_ptr<Communicator>()>& device_control = {});

}  // namespace certkv
