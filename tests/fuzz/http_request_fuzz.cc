// What is sent to the HTTP port: every answer is whole HTTP/1.1 with a status of ours, nothing but
// a GET or HEAD of a known path is answered with 200, and the server goes on serving.
#include <cctype>

#include "kernels/base/log.h"
#include "kvstore/http/status_server.h"
#include "tests/fuzz/target.h"
#include "tests/kvstore/status_reports.h"

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using certkv::fuzz::require;

const certkv::StatusThread& server() {
  static const certkv::StatusThread instance = [] {
    certkv::log_set_level(certkv::LogLevel::Error);
    return certkv::StatusThread({.listen = "127.0.0.1:0"}, certkv::test::sample_report);
  }();
  return instance;
}

// Sends all, ends its own side, reads to the end.
std::string converse(std::string_view bytes) {
  asio::io_context io;
  tcp::socket socket(io);
  socket.connect({asio::ip::address_v4::loopback(), server().port()});
  boost::system::error_code error;
  asio::write(socket, asio::buffer(bytes.data(), bytes.size()), error);
  socket.shutdown(tcp::socket::shutdown_send, error);
  std::string all;
  std::array<char, 16384> piece;
  for (;;) {
    const size_t n = socket.read_some(asio::buffer(piece), error);
    all.append(piece.data(), n);
    if (error) return all;
  }
}

// The number of whole answers in `text`, the `ok` ones counted apart.
size_t judge(std::string_view text, bool only_heads, size_t& ok) {
  size_t answers = 0;
  while (!text.empty()) {
    require(text.starts_with("HTTP/1.1 ") && text.size() > 12, "an answer that is none");
    const int status = std::atoi(std::string(text.substr(9, 3)).c_str());
    require(status == 200 || status == 400 || status == 404 || status == 405 || status == 413 ||
                status == 421 || status == 431 || status == 505,
            "a status that the server does not give");
    ok += status == 200;
    ++answers;
    const size_t end = text.find("\r\n\r\n");
    require(end != text.npos, "a header without an end");
    const std::string_view header = text.substr(0, end);
    const size_t at = header.find("Content-Length: ");
    require(at != header.npos, "an answer without a length");
    size_t length = std::strtoul(std::string(header.substr(at + 16, 12)).c_str(), nullptr, 10);
    text.remove_prefix(end + 4);
    // The answer to a HEAD has no body; which of several it was is told by what follows.
    if (text.size() < length || text.starts_with("HTTP/1.1 ")) {
      require(only_heads, "an answer without its body");
      length = 0;
    }
    text.remove_prefix(length);
  }
  return answers;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const bool may_be_head = bytes.find("HEAD") != bytes.npos;
  size_t ok = 0;
  judge(converse(bytes), may_be_head, ok);
  if (ok != 0) {
    require(bytes.find("GET ") != bytes.npos || may_be_head, "200 without a GET or HEAD");
    ++certkv::fuzz::accepted;
  }
  size_t alive = 0;
  judge(converse("GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"), false, alive);
  require(alive == 1, "the server does not serve any more");
  return 0;
}

certkv::fuzz::Plan certkv::fuzz::plan() {
  const std::string host = "Host: localhost\r\n", end = "\r\n";
  return {"HttpRequestFuzz",
          {"GET /healthz HTTP/1.1\r\n" + host + end,
           "HEAD /metrics HTTP/1.1\r\n" + host + "Connection: close\r\n" + end,
           "GET /v1/status?x=1 HTTP/1.0\r\nHost: 127.0.0.1:80\r\nAccept: */*\r\n" + end,
           "GET /readyz HTTP/1.1\r\n" + host + end + "GET / HTTP/1.1\r\n" + host + end},
          {"GET ",
           "HEAD ",
           "POST ",
           "HTTP/1.1",
           "HTTP/9.9",
           "\r\n",
           "\r\n\r\n",
           host,
           "Content-Length: 5\r\n",
           "Content-Length: -1\r\n",
           "Transfer-Encoding: chunked\r\n",
           "Transfer-Encoding: gzip, chunked\r\n",
           "Expect: 100-continue\r\n",
           "Upgrade: h2c\r\n",
           "\r\n folded",
           std::string("\0", 1),
           "\xff",
           "%2e%2e/",
           "?",
           std::string(20'000, 'a'),
           "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
          2000};
}
