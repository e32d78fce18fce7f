// Addresses as users write them, and sockets that listen on them.
#pragma once

#include <string>

#include "kernels/base/asio.h"

namespace certkv {

struct HostPort {
  std::string host, port;
};
// "host:port", or "[host]:port" for IPv6. Throws InvalidArgument naming `whose` address it is.
HostPort split_address(const std::string& text, const std::string& whose);

// Listens there; port 0: any. Not passed on to programs that this one starts. Throws
// InvalidArgument.
boost::asio::ip::tcp::acceptor listen_on(boost::asio::io_context& io, const std::string& text,
                                         const std::string& whose);

void close_on_exec(int fd);

}  // namespace certkv
