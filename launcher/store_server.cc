// certkv store-server: what a store's originals are read through by other nodes. The store starts
// it when it is told to listen; by hand it is of use to those who test.
#include <fmt/core.h>

#include "kvstore/server/server_process.h"
#include "launcher/commands.h"
#include "runtime/options_io.h"

namespace certkv {

int store_server_command(Args& args) {
  StoreServerOptions o;
  std::string peers;
  int64_t replicas = o.replicas, lag_limit_bytes = int64_t(o.lag_limit_bytes);
  int64_t heartbeat_ms = o.heartbeat.count(), silence_ms = o.silence.count();
  OptionTable table;
  table.add("holder", &o.holder, {.meaning = "control socket of the node's store; needed"});
  table.add("listen", &o.listen, {.meaning = "address to listen at, host:port; needed"});
  table.add("require", &o.require, {.meaning = "the network must be this: auto, tcp, shm, rdma"});
  table.add("peers", &peers,
            {.meaning = "stores of other nodes that get copies, host:port with commas between"});
  table.add(
      "replicas", &replicas,
      {.meaning = "copies of every sealed block, this node's included; the others go to peers",
       .unit = "copies",
       .cost = "host memory and network of the peers",
       .min = 1,
       .max = 3});
  table.add("lag_limit_bytes", &lag_limit_bytes,
            {.meaning = "ranks that seal wait while copies lag by more; 0: never",
             .unit = "bytes",
             .cost = "more originals have one copy alone",
             .min = 0,
             .max = 1e15});
  table.add("key_file", &o.key_file,
            {.meaning = "file (mode 0600) with the job's key, 64 hexadecimal digits"});
  table.add("key_fd", &o.key_fd,
            {.meaning = "an inherited descriptor to read the job's key from; -1: none",
             .unit = "number",
             .cost = "nothing",
             .min = -1,
             .max = 1 << 20});
  table.add("heartbeat_ms", &heartbeat_ms,
            {.meaning = "between two signs of life on a connection",
             .unit = "milliseconds",
             .cost = "dead peers are noticed later",
             .min = 1,
             .max = 60000});
  table.add("silence_ms", &silence_ms,
            {.meaning = "a peer that is silent for longer is lost",
             .unit = "milliseconds",
             .cost = "dead peers are noticed later",
             .min = 2,
             .max = 600000});
  if (table.read_arguments(args.values).help) {
    fmt::print(
        "usage: certkv store-server --holder SOCKET --listen HOST:PORT [--key value ...]"
        "\n\n{}",
        table.help());
    return kExitDone;
  }
  std::vector<std::string> words{"--holder", o.holder, "--listen", o.listen};
  if (!peers.empty()) words.insert(words.end(), {"--peers", peers});
  o.peers = parse_store_server_arguments(words).peers;
  o.replicas = unsigned(replicas);
  o.lag_limit_bytes = uint64_t(lag_limit_bytes);
  o.heartbeat = std::chrono::milliseconds(heartbeat_ms);
  o.silence = std::chrono::milliseconds(silence_ms);
  return run_store_server(o);
}

}  // namespace certkv
