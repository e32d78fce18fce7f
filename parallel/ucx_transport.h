// The transport over UCX: TCP between nodes, RDMA where there is any.
//
// One thread owns the UCX worker and everything made from it; others hand it work. Bodies above
// kEagerBytes go by rendezvous, from window to window. Whoever connects says hello with a nonce, is
// answered with another and a tag, and is a stranger until a message of its own bore one: a
// stranger can make this end send 40 bytes, and ends after 5 s.
//
// UCX itself authenticates nobody, and aborts its process on some kinds of garbage. So a process
// that listens must have nothing to lose.
#pragma once

#include <memory>

#include "parallel/transport.h"

namespace certkv {

// Throws InvalidArgument (options, an address that cannot be listened at) and CommError (no such
// network: names options.require). Logs the chosen networks in one line.
std::unique_ptr<Transport> make_ucx_transport(const JobKey& key, const TransportOptions& options,
                                              TransportHandler handler);

}  // namespace certkv
