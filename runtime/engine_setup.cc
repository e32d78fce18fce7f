#include "runtime/engine_setup.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kvstore/client.h"
#include "kvstore/store_process.h"
#include "parallel/communicator.h"
#include "runtime/byte_size.h"
#include "runtime/certified_engine.h"
#include "runtime/host_memory.h"
#include "runtime/manifest.h"
#include "runtime/originals_scope.h"
#include "runtime/output_file.h"
#include "runtime/tokenizer.h"
#include "runtime/weights.h"

namespace certkv {
namespace {

std::chrono::milliseconds milliseconds_of(double seconds) {
  return std::chrono::milliseconds(int64_t(seconds * 1000));
}

// What a rank tells the others of its node about the store that it started.
struct StoreNote {
  char socket[240] = {};
  char error[760] = {};
  uint64_t kind = 0;  // 1 + ErrorKind of a failure
};

void copy_text(const std::string& text, char* out, size_t room) {
  const size_t n = std::min(text.size(), room - 1);
  std::memcpy(out, text.data(), n);
  out[n] = '\0';
}

// What lacks memory before anything has run is a configuration that does not fit this machine.
// `key` is the one that decides how much is taken.
template <typename Body>
auto admit(const char* key, const std::string& value, Body body) {
  try {
    return body();
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::OutOfMemory) throw;
    CERTKV_THROW(InvalidArgument, "{} is '{}': {}", key, value, e.what());
  }
}

uint64_t arena_bytes_of(const JobOptions& options, uint64_t automatic) {
  if (options.store.arena == "auto") return automatic;
  const std::optional<uint64_t> bytes = parse_byte_size(options.store.arena);
  CERTKV_EXPECT(bytes.has_value(), InvalidArgument,
                "store.arena is '{}': write auto or a size such as 8GiB", options.store.arena);
  return *bytes;
}

// The socket of the node's store. The first local rank starts it; all ranks learn how it went, so
// that they fail together and say the same.
std::string start_store(const JobOptions& options, Communicator& world, const Topology& topology,
                        uint64_t arena_bytes) {
  StoreNote mine;
  if (topology.first_local_rank()) {
    try {
      StoreProcessOptions o;
      o.arena_bytes = arena_bytes;
      o.linger = milliseconds_of(options.store.linger_seconds);
      const SpawnedStore store = admit("store.arena", options.store.arena, [&] {
        return spawn_store(o, milliseconds_of(options.store.deadline_seconds));
      });
      copy_text(store.socket, mine.socket, sizeof mine.socket);
      log_info("store of this node: process {}, {} of originals, socket {}", store.pid,
               byte_size_text(arena_bytes), store.socket);
    } catch (const Error& e) {
      mine.kind = 1 + uint64_t(e.kind());
      copy_text(e.what(), mine.error, sizeof mine.error);
    }
  }
  std::vector<StoreNote> all(static_cast<size_t>(world.size()));
  world.all_gather({&mine, sizeof mine, DType::U8, MemoryKind::Host},
                   {all.data(), all.size() * sizeof(StoreNote), DType::U8, MemoryKind::Host}, {});
  world.wait(std::chrono::minutes(2));  // a large arena takes its time to be allocated
  for (const StoreNote& note : all)
    if (note.kind != 0) throw Error(ErrorKind(note.kind - 1), note.error, __FILE__, __LINE__);
  for (size_t r = 0; r < all.size(); ++r)
    if (topology.node_of_rank[r] == topology.node && all[r].socket[0] != '\0') return all[r].socket;
  CERTKV_THROW(StoreLost, "no rank of node {} started a store", topology.node);
}

// Collective over `world`.
AuditSetup audit_setup(const JobOptions& options, Communicator& world, Communicator& group) {
  AuditSetup a;
  a.folder = audit_folder(options);
  a.sample = options.audit.sample;
  a.seed = options.sampling.seed;
  a.rank = world.rank();
  a.world = world.size();
  a.tensor = group.size();
  a.tensor_rank = group.rank();
  a.replica = a.rank / a.tensor;
  a.model_files = digest_model_files(options.model.path);
  make_folders(a.folder);
  uint64_t session = uint64_t(audit::next_session(a.folder));
  world.broadcast(view_u64(&session, 1), 0, {});
  world.wait();
  a.session = int(session);
  return a;
}

}  // namespace

std::string audit_folder(const JobOptions& options) {
  return options.audit.folder.empty() ? options.run.output + "/audit" : options.audit.folder;
}

LoadedModel load_model(const JobOptions& options, int tensor) {
  CERTKV_EXPECT(!options.model.path.empty(), InvalidArgument,
                "model.path is not set: name a model folder with --model");
  LoadedModel m;
  m.config = std::make_shared<const ModelConfig>(load_model_config(options.model.path));
  if (tensor > 0) kv_heads_of_rank(m.config->kv_heads, tensor, 0);
  m.tokenizer = load_tokenizer(options.model.path);
  m.chat = choose_chat_template(options.model.chat_template, m.config->model_type, *m.tokenizer);
  m.token_limit = engine_token_limit(options, *m.config);
  return m;
}

uint64_t arena_demand(const JobOptions& options, const ModelConfig& config, int tensor,
                      int local_ranks, std::span<const RequestShape> requests) {
  std::vector<uint64_t> each;
  for (const RequestShape& r : requests)
    each.push_back(
        engine_need(options, config, tensor, r.prompt_tokens, r.max_tokens, r.forks).arena);
  std::sort(each.rbegin(), each.rend());
  uint64_t sum = 0;
  for (size_t i = 0; i < each.size() && i < size_t(options.run.max_batch); ++i) sum += each[i];
  constexpr uint64_t kHeader = 1 << 20;  // of the arena, and for rounding up of extents
  return uint64_t(local_ranks) * sum + kHeader;
}

EngineSetup set_up_engine(const JobOptions& options, const LoadedModel& model, Communicator& world,
                          Communicator& group, const Topology& topology, uint64_t arena_bytes,
                          const std::function<std::unique_ptr<Communicator>()>& device_control) {
  const ModelConfig& config = *model.config;
  shares_originals(options);  // refuses what the backend cannot
  admit("model.path", options.model.path, [&] {
    check_weights_fit(config, group.size(), topology.local_size, available_memory_bytes(),
                      weight_format(options.model.quantization));
  });
  world.barrier({});
  world.wait();

  EngineSetup out;
  std::string socket = options.store.socket;
  if (options.store.mode == "auto")
    socket = start_store(options, world, topology, arena_bytes_of(options, arena_bytes));
  StoreClientOptions client;
  client.socket = socket;
  client.rank = world.rank();
  client.deadline = milliseconds_of(options.store.deadline_seconds);
  out.store = StoreClient::attach(client, Deadline::after(client.deadline));

  EngineParts parts;
  parts.config = model.config;
  parts.weights = std::make_shared<const Weights>(
      load_weights(options.model.path, config, group.size(), group.rank(),
                   weight_format(options.model.quantization)));
  world.alive();
  parts.tokenizer = model.tokenizer;
  parts.stop_ids = model.chat.stop_ids(*model.tokenizer);
  parts.group = &group;
  parts.device_control = device_control;
  parts.store = out.store;
  if (shares_originals(options)) {
    if (const auto digest = digest_model(options.model.path, world, topology)) {
      parts.scope =
          originals_scope(options, config, group.size(), originals_dtype(options, config), *digest);
    } else if (world.rank() == 0) {
      log_warning("model.path {}: the nodes' files differ; no prompt shares originals",
                  options.model.path);
    }
  }
  parts.threads = options.parallel.threads > 0 ? options.parallel.threads : topology.threads;
  parts.local_ranks = topology.local_size;
  parts.local_rank = topology.local_rank;
  if (options.audit.sample > 0) parts.audit = audit_setup(options, world, group);
  world.barrier({});  // loading takes each rank its own time
  world.wait(std::chrono::minutes(10));
  out.engine = make_engine(options, std::move(parts));
  return out;
}

}  // namespace certkv
