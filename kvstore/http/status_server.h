// Health, metrics and status of a process over HTTP/1.1: read-only, for GET and HEAD.
//
//   /healthz     200 while the process answers
//   /readyz      200 when it does its work, else 503 and the reason
//   /metrics     Prometheus's text format
//   /v1/status   JSON
//   /            a page that shows /v1/status, live
//
// Everything that comes in is an attacker's: a header of at most 16 KiB within 5 s, no body, at
// most `max_connections` (the one that has been idle longest makes room), 100 requests on each, 5 s
// for an answer to be taken. Nothing that is asked changes anything. On a loopback address requests
// for another host are refused, so that no web page reads the status by way of its own name (DNS
// rebinding).
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "kernels/base/asio.h"
#include "kvstore/http/status_report.h"

namespace certkv {

struct HttpOptions {
  std::string listen;  // host:port, [host]:port for IPv6; port 0: any
  size_t max_connections = 64;
  size_t max_header_bytes = 16 * 1024;
  unsigned max_requests = 100;  // on one connection
  std::chrono::milliseconds limit{5000};
};

class StatusServer {
 public:
  // Called on the io_context's thread for every /readyz, /metrics and /v1/status: cheap, and safe
  // beside whatever else runs. What it throws becomes an answer 500.
  using Source = std::function<StatusReport()>;

  // Listens at once. Throws InvalidArgument for an address that does not do.
  StatusServer(boost::asio::io_context& io, HttpOptions options, Source source);
  // Where no thread runs the io_context, or in the one that does. Ends all connections.
  ~StatusServer();
  StatusServer(const StatusServer&) = delete;
  StatusServer& operator=(const StatusServer&) = delete;

  uint16_t port() const;
  std::string url() const;  // "http://127.0.0.1:8080/"

  struct Counts {
    uint64_t connections = 0, requests = 0, refused = 0;
  };
  Counts counts() const;  // any thread

 private:
  struct State;
  class Connection;
  std::shared_ptr<State> state_;
};

// The same with a thread of its own, for a process that has something better to do.
class StatusThread {
 public:
  StatusThread(HttpOptions options, StatusServer::Source source);
  ~StatusThread();
  std::string url() const { return server_->url(); }
  uint16_t port() const { return server_->port(); }
  StatusServer::Counts counts() const { return server_->counts(); }

 private:
  boost::asio::io_context io_;
  std::unique_ptr<StatusServer> server_;
  std::thread thread_;
};

}  // namespace certkv
