// A transport between parts of one process, for tests: the same calls, limits and endings as over a
// network, without one. Names of the form "local:N" stand in for addresses.
#pragma once

#include <memory>
#include <string>

#include "parallel/transport.h"

namespace certkv {

// What the transports of one test are connected by. THREADS: safe.
class LocalNetwork {
 public:
  static std::shared_ptr<LocalNetwork> create();
  virtual ~LocalNetwork() = default;

  // `options.listen` is "local:0" for any number. Two ends with different keys do not connect.
  virtual std::unique_ptr<Transport> make(const JobKey& key, const TransportOptions& options,
                                          TransportHandler handler) = 0;

  // What befalls the process that listens there: it is gone at once; it stands still; it goes on.
  virtual void kill(const std::string& address) = 0;
  virtual void pause(const std::string& address) = 0;
  virtual void resume(const std::string& address) = 0;
};

}  // namespace certkv
