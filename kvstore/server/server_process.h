// `certkv store-server` as a process: a session of the node's holder that talks to other nodes. It
// owns nothing that could be lost, so it may die at any time; the holder starts it again.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "parallel/transport.h"

namespace certkv {

struct StoreServerOptions {
  std::string holder;              // control socket of the node's store
  std::string listen;              // "host:port"
  std::string require = "auto";    // TransportOptions::require
  int key_fd = -1;                 // the job's key, from an inherited descriptor, or
  std::string key_file;            // from a file of mode 0600
  std::vector<std::string> peers;  // stores that get copies, the best first; itself is left out
  unsigned replicas = 1;           // copies in all, this node's included
  uint64_t lag_limit_bytes = uint64_t(256) << 20;  // sealing waits while copies lag by more
  std::chrono::milliseconds heartbeat{250}, silence{2000};
};

// Runs until SIGTERM or SIGINT, or until the holder is lost. Returns the exit code: 0; 2 for wrong
// options (an address that cannot be listened at, no key); 4 where the holder is lost; 1 for
// anything else. Logs its errors. REQUIRES to be called from the main thread of a process of its
// own.
int run_store_server(const StoreServerOptions& options);

// The command line after `store-server`, and back. parse throws InvalidArgument.
std::vector<std::string> store_server_arguments(const StoreServerOptions& options);
StoreServerOptions parse_store_server_arguments(const std::vector<std::string>& arguments);

}  // namespace certkv
