#include "kvstore/listen.h"

#include <fcntl.h>

#include "kernels/base/error.h"

namespace certkv {

using Tcp = boost::asio::ip::tcp;

HostPort split_address(const std::string& text, const std::string& whose) {
  const size_t colon = text.rfind(':');
  HostPort a;
  if (colon != std::string::npos) {
    a = {text.substr(0, colon), text.substr(colon + 1)};
    if (a.host.size() > 2 && a.host.front() == '[' && a.host.back() == ']') {
      a.host = a.host.substr(1, a.host.size() - 2);
    }
  }
  const bool digits = !a.port.empty() && a.port.size() <= 5 &&
                      a.port.find_first_not_of("0123456789") == std::string::npos;
  CERTKV_EXPECT(digits && !a.host.empty() && std::stoi(a.port) <= 65535, InvalidArgument,
                "{}: '{}' is no address; host:port is needed, [host]:port for IPv6", whose, text);
  return a;
}

void close_on_exec(int fd) {
  const int flags = fcntl(fd, F_GETFD);
  if (flags >= 0) fcntl(fd, F_SETFD, flags | FD_CLOEXEC);
}

Tcp::acceptor listen_on(boost::asio::io_context& io, const std::string& text,
                        const std::string& whose) {
  const HostPort a = split_address(text, whose);
  boost::system::error_code error;
  const auto found = Tcp::resolver(io).resolve(a.host, a.port, Tcp::resolver::passive, error);
  CERTKV_EXPECT(!error && !found.empty(), InvalidArgument, "{} {}: {}", whose, text,
                error.message());
  const Tcp::endpoint endpoint = found.begin()->endpoint();
  Tcp::acceptor acceptor(io);
  acceptor.open(endpoint.protocol(), error);
  if (!error) {
    close_on_exec(acceptor.native_handle());
    acceptor.set_option(Tcp::acceptor::reuse_address(true), error);
  }
  if (!error) acceptor.bind(endpoint, error);
  if (!error) acceptor.listen(128, error);
  CERTKV_EXPECT(!error, InvalidArgument, "{} {}: cannot listen there: {}", whose, text,
                error.message());
  return acceptor;
}

}  // namespace certkv
