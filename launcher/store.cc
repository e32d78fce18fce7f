// certkv store: one node's originals. Jobs start it by themselves (store.mode auto) with the same
// flags; by hand it is started for store.mode attach.
#include <fmt/core.h>

#include "kvstore/store_process.h"
#include "launcher/commands.h"
#include "runtime/byte_size.h"
#include "runtime/options_io.h"

namespace certkv {

namespace {

constexpr double kMaxMilliseconds = 1 << 30;

struct StoreKeys {
  std::string socket;
  std::string arena_bytes;
  int64_t linger_ms = StoreProcessOptions().linger.count();
  int64_t attach_within_ms = StoreProcessOptions().attach_within.count();
  int64_t max_connections = int64_t(StoreProcessOptions().max_connections);
  int ready_fd = -1;
  std::string listen, require = StoreProcessOptions().require, peers, key_file;
  int key_fd = -1;
  int64_t replicas = StoreProcessOptions().replicas;
};

void add_keys(OptionTable& table, StoreKeys& o) {
  table.add("arena_bytes", &o.arena_bytes,
            {.meaning = "size of the arena of originals; needed",
             .unit = "bytes (KiB MiB GiB TiB kB MB GB TB)",
             .cost = "host memory that is taken at start",
             .flags = "arena"});
  table.add("socket", &o.socket,
            {.meaning = "control socket: a path, or @name for an abstract one; empty: a random "
                        "abstract one, printed at start"});
  table.add("linger_ms", &o.linger_ms,
            {.meaning = "ends itself this long after its last rank is gone; -1: never",
             .unit = "milliseconds",
             .cost = "host memory stays taken for longer after a job",
             .min = -1,
             .max = kMaxMilliseconds});
  table.add(
      "attach_within_ms", &o.attach_within_ms,
      {.meaning = "ends itself when no rank has attached this long after its start; -1: never",
       .unit = "milliseconds",
       .cost = "an unused store stays for longer",
       .min = -1,
       .max = kMaxMilliseconds});
  table.add("max_connections", &o.max_connections,
            {.meaning = "ranks that may be attached at once",
             .unit = "connections",
             .cost = "file descriptors",
             .min = 1,
             .max = 65536});
  table.add("listen", &o.listen,
            {.meaning = "serves other nodes at this address, host:port; empty: no network at all"});
  table.add("require", &o.require,
            {.meaning = "the network must be this: auto takes what there is, tcp, shm (one node), "
                        "rdma"});
  table.add("peers", &o.peers,
            {.meaning = "stores of other nodes that get copies of what is sealed, host:port with "
                        "commas between"});
  table.add(
      "replicas", &o.replicas,
      {.meaning = "copies of every sealed block, this node's included; the others go to peers",
       .unit = "copies",
       .cost = "host memory and network of the peers",
       .min = 1,
       .max = 3});
  table.add("key_file", &o.key_file,
            {.meaning = "file (mode 0600) with the key that all processes of a job share, 64 "
                        "hexadecimal digits; without it and key_fd a random one"});
  table.add("key_fd", &o.key_fd,
            {.meaning = "an inherited descriptor to read that key from; -1: none",
             .unit = "number",
             .cost = "nothing",
             .min = -1,
             .max = 1 << 20});
  table.add("ready_fd", &o.ready_fd,
            {.meaning = "a file descriptor to tell when it can be attached to, instead of standard "
                        "output; -1: none",
             .unit = "number",
             .cost = "nothing",
             .min = -1,
             .max = 1 << 20});
}

}  // namespace

int store_command(Args& args) {
  StoreKeys keys;
  OptionTable table;
  add_keys(table, keys);
  if (table.read_arguments(args.values).help) {
    fmt::print("usage: certkv store --arena SIZE [--key value ...]\n\n{}", table.help());
    return kExitDone;
  }
  const auto bytes = parse_byte_size(keys.arena_bytes);
  CERTKV_EXPECT(!keys.arena_bytes.empty(), InvalidArgument,
                "command line: certkv store needs --arena SIZE, such as 4GiB or 512MB");
  CERTKV_EXPECT(bytes.value_or(0) > 0, InvalidArgument,
                "{}: arena_bytes is '{}'; allowed: a size such as 4GiB or 512MB",
                table.source("arena_bytes").text(), keys.arena_bytes);
  StoreProcessOptions options;
  options.socket = keys.socket;
  options.arena_bytes = *bytes;
  options.linger = std::chrono::milliseconds(keys.linger_ms);
  options.attach_within = std::chrono::milliseconds(keys.attach_within_ms);
  options.max_connections = size_t(keys.max_connections);
  options.ready_fd = keys.ready_fd;
  options.listen = keys.listen;
  options.require = keys.require;
  options.peers = keys.peers;
  options.key_file = keys.key_file;
  options.key_fd = keys.key_fd;
  options.replicas = int(keys.replicas);
  return run_store(options);
}

}  // namespace certkv
