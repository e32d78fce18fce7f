// `certkv store` as a process: how it is started by the first local rank, and what it runs.
//
// The process lives in a session of its own and inherits nothing but standard error, so that the
// death of the rank that started it takes neither it nor the originals along. It ends itself.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/deadline.h"

namespace certkv {

struct StoreProcessOptions {
  std::string socket;  // "@name", a path, or empty: a random abstract name
  uint64_t arena_bytes = 0;
  std::chrono::milliseconds linger{2000};          // < 0: for ever
  std::chrono::milliseconds attach_within{10000};  // < 0: for ever
  size_t max_connections = 256;
  // The server for other nodes: none unless an address to listen at is given.
  std::string listen;            // "host:port"
  std::string require = "auto";  // network: auto, tcp, shm, rdma
  std::string peers;             // "host:port,host:port": stores that get copies
  int replicas = 1;              // copies in all, this node's included
  std::string key_file;          // the job's key; empty and no key_fd: a key of this store alone
  int key_fd = -1;
  int ready_fd = -1;  // a pipe to whoever started it; -1: prints its socket to standard output
  std::string executable = "/proc/self/exe";  // of spawn_store; an absolute path
};

struct SpawnedStore {
  std::string socket;  // for StoreClient::attach, on this node
  int64_t pid = 0;
};

// Starts `executable store ...` and waits until it can be attached to. The deadline counts from the
// last stretch of memory that it has allocated, since a large arena takes seconds. Throws what the
// store says (OutOfMemory, InvalidArgument, ...), StoreLost where it ends without a word, and
// DeadlineExceeded, after which it is ended.
SpawnedStore spawn_store(const StoreProcessOptions& options, std::chrono::milliseconds silence);

// The body of `certkv store`: makes the arena, serves until it ends itself, SIGTERM or SIGINT.
// Returns the exit code: 0; 2 for bad arguments and for an arena that memory has no room for; 1 for
// anything else. Logs its errors. REQUIRES to be called from the main thread of a process of its
// own.
int run_store(const StoreProcessOptions& options);

// The command line after `store`, and back. parse throws InvalidArgument.
std::vector<std::string> store_arguments(const StoreProcessOptions& options);
StoreProcessOptions parse_store_arguments(const std::vector<std::string>& arguments);

}  // namespace certkv
