// The HTTP endpoint, spoken to byte by byte.
#include "kvstore/http/status_server.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cmath>
#include <limits>

#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "kernels/base/deadline.h"
#include "kernels/base/log.h"
#include "tests/kvstore/status_reports.h"
#include "tests/support/thrown_by.h"

namespace certkv::test {
namespace {

namespace asio = boost::asio;
using Tcp = asio::ip::tcp;
using std::chrono::milliseconds;

// A client that sends what it is told and reads until the other side ends, or enough has come.
class Client {
 public:
  explicit Client(uint16_t port) : socket_(io_) {
    socket_.connect({asio::ip::address_v4::loopback(), port});
  }
  void send(const std::string& text) {
    boost::system::error_code ignored;  // it may be gone already
    asio::write(socket_, asio::buffer(text), ignored);
  }
  // Everything up to the end of the connection, or until `enough` characters are there.
  std::string read(size_t enough = size_t(-1), milliseconds within = milliseconds(20000)) {
    std::string all;
    step(all, enough);
    io_.restart();
    io_.run_for(within * kDeadlineFactor);
    socket_.cancel();
    io_.restart();
    io_.poll();
    return all;
  }
  bool ended() const { return ended_; }

 private:
  void step(std::string& all, size_t enough) {
    socket_.async_read_some(asio::buffer(buffer_),
                            [this, &all, enough](boost::system::error_code e, size_t n) {
                              all.append(buffer_.data(), n);
                              if (e)
                                ended_ = e != asio::error::operation_aborted;
                              else if (all.size() < enough)
                                step(all, enough);
                            });
  }
  asio::io_context io_;
  Tcp::socket socket_;
  std::array<char, 8192> buffer_{};
  bool ended_ = false;
};

std::string get(uint16_t port, const std::string& path, const std::string& method = "GET",
                const std::string& more = "Host: localhost\r\nConnection: close\r\n") {
  Client c(port);
  c.send(method + " " + path + " HTTP/1.1\r\n" + more + "\r\n");
  return c.read();
}
std::string body_of(const std::string& answer) {
  const size_t end = answer.find("\r\n\r\n");
  return end == std::string::npos ? "" : answer.substr(end + 4);
}

HttpOptions loopback() {
  HttpOptions o;
  o.listen = "127.0.0.1:0";
  return o;
}

TEST(StatusServer, AnswersForHealthReadinessMetricsStatusAndPage) {
  std::atomic<bool> ready{true};
  const StatusThread server(loopback(), [&] {
    StatusReport r = sample_report();
    r.ready = ready;
    r.reason = ready ? "" : "the weights are being loaded";
    return r;
  });
  const uint16_t port = server.port();
  EXPECT_EQ(server.url(), "http://127.0.0.1:" + std::to_string(port) + "/");
  EXPECT_TRUE(get(port, "/healthz").starts_with("HTTP/1.1 200 OK\r\n"));
  EXPECT_EQ(body_of(get(port, "/healthz")), "ok\n");
  EXPECT_EQ(body_of(get(port, "/readyz?x=1")), "ready\n");
  ready = false;
  EXPECT_TRUE(get(port, "/readyz").starts_with("HTTP/1.1 503 "));
  EXPECT_EQ(body_of(get(port, "/readyz")), "the weights are being loaded\n");
  EXPECT_TRUE(get(port, "/healthz").starts_with("HTTP/1.1 200 ")) << "it still answers";
  EXPECT_NE(get(port, "/").find("Content-Security-Policy: default-src 'none'"), std::string::npos);
  EXPECT_NE(body_of(get(port, "/")).find("<!doctype html>"), std::string::npos);
  EXPECT_TRUE(get(port, "/etc/passwd").starts_with("HTTP/1.1 404 "));
  EXPECT_TRUE(get(port, "/../v1/status").starts_with("HTTP/1.1 404 "));
  const std::string head = get(port, "/v1/status", "HEAD");
  EXPECT_NE(head.find("Content-Length: "), std::string::npos);
  EXPECT_EQ(body_of(head), "");
  const auto status = nlohmann::json::parse(body_of(get(port, "/v1/status")));
  EXPECT_EQ(status["cluster"]["nodes"][3]["name"], "<b>delta</b>");
  EXPECT_EQ(status["cluster"]["epoch"], std::to_string(sample_report().cluster->epoch));
  EXPECT_EQ(status["job"]["rungs"][1], 400001);
  EXPECT_EQ(status["job"]["relative_bound"]["p95"], 0.0311);
}

// The text format, read by its grammar: every sample after its family's HELP and TYPE.
std::map<std::string, double> parse_metrics(const std::string& text) {
  std::map<std::string, double> values;
  std::string family;
  std::istringstream lines(text);
  for (std::string l; std::getline(lines, l);) {
    const size_t brace = l.find('{'), blank = l.rfind(' ');
    if (l.starts_with("# HELP ") || l.starts_with("# TYPE ")) {
      family = l.substr(7, l.find(' ', 7) - 7);
    } else if (blank != std::string::npos && blank > 0 &&
               (brace == std::string::npos || l[blank - 1] == '}')) {
      const std::string name = l.substr(0, std::min(brace, blank));
      EXPECT_EQ(name, family) << l;
      EXPECT_TRUE(std::all_of(name.begin(), name.end(), [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == ':';
      })) << l;
      EXPECT_TRUE(values.emplace(l.substr(0, blank), std::stod(l.substr(blank + 1))).second)
          << "twice: " << l;
    } else {
      ADD_FAILURE() << "no line of the format: " << l;
    }
  }
  return values;
}

TEST(StatusServer, MetricsHaveEveryFigureUnderItsName) {
  const auto values = parse_metrics(metrics_text(sample_report()));
  const auto expect = [&](const std::string& name, double value) {
    const auto at = values.find(name);
    ASSERT_NE(at, values.end()) << name;
    EXPECT_DOUBLE_EQ(at->second, value) << name;
  };
  expect("certkv:num_requests_running", 8);
  expect("certkv:num_requests_waiting", 369);
  expect("certkv:request_success_total", 121);
  expect("certkv:request_failure_total", 2);
  expect("certkv:generation_tokens_total", 365421);
  expect("certkv:prompt_tokens_total", 4030201);
  expect("certkv:kv_cache_usage_perc", 0.375);
  expect("certkv:arena_usage_perc", 0.375);
  expect("certkv:head_steps_total{outcome=\"exact\"}", 70002);
  expect("certkv:head_step_rungs_total{rung=\"4\"}", 2);
  expect("certkv:relative_bound{quantile=\"0.99\"}", 0.0402);
  expect("certkv:relative_bound_worst", 0.0487);
  expect("certkv:replication_lag_bytes", 5242880);
  expect("certkv:node_alive{node=\"gamma\"}", 1);
  expect("certkv:node_member{node=\"gamma\"}", 0);
  expect("certkv:blocks_served_total", 271828);
}

TEST(StatusServer, FiguresThatAreNotFiniteAreSaidInWords) {
  StatusReport r = sample_report();
  r.job->worst_relative = std::numeric_limits<double>::quiet_NaN();
  r.job->relative_max = std::numeric_limits<double>::infinity();
  r.name = "no UTF-8: \xff";
  const auto status = nlohmann::json::parse(status_json(r));
  EXPECT_EQ(status["job"]["relative_bound"]["worst"], "nan");
  EXPECT_EQ(status["job"]["relative_bound"]["max"], "inf");
  const auto values = parse_metrics(metrics_text(r));
  EXPECT_TRUE(std::isnan(values.at("certkv:relative_bound_worst")));
}

TEST(StatusServer, ASourceThatThrowsIsAnError500AndNoMore) {
  log_set_level(LogLevel::Error);
  const StatusThread server(loopback(), []() -> StatusReport { CERTKV_THROW(StoreLost, "gone"); });
  EXPECT_TRUE(get(server.port(), "/metrics").starts_with("HTTP/1.1 500 "));
  EXPECT_TRUE(get(server.port(), "/healthz").starts_with("HTTP/1.1 200 "));
}

TEST(StatusServer, OnlyGetAndHeadWithoutABodyAreServed) {
  const StatusThread server(loopback(), sample_report);
  for (const char* method : {"POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "BREW"}) {
    const std::string a = get(server.port(), "/v1/status", method);
    EXPECT_TRUE(a.starts_with("HTTP/1.1 405 ")) << method << ": " << a;
    EXPECT_NE(a.find("Allow: GET, HEAD"), std::string::npos);
  }
  const std::string host = "Host: localhost\r\n";
  EXPECT_TRUE(
      get(server.port(), "/", "GET", host + "Content-Length: 5\r\n").starts_with("HTTP/1.1 413 "));
  EXPECT_TRUE(get(server.port(), "/", "GET", host + "Transfer-Encoding: chunked\r\n")
                  .starts_with("HTTP/1.1 413 "));
  EXPECT_TRUE(
      get(server.port(), "/", "GET", "Host: evil.example\r\n").starts_with("HTTP/1.1 421 "));
  EXPECT_TRUE(get(server.port(), "/", "GET", "").starts_with("HTTP/1.1 421 "));
}

TEST(StatusServer, AHeaderThatIsTooLongOrNoneIsRefused) {
  const StatusThread server(loopback(), sample_report);
  const std::string fits =
      "Host: localhost\r\nConnection: close\r\nX: " + std::string(15'000, 'a') + "\r\n";
  EXPECT_TRUE(get(server.port(), "/healthz", "GET", fits).starts_with("HTTP/1.1 200 "));
  const std::string over = "Host: localhost\r\nX: " + std::string(17'000, 'a') + "\r\n";
  EXPECT_TRUE(get(server.port(), "/healthz", "GET", over).starts_with("HTTP/1.1 431 "));
  Client endless(server.port());
  endless.send("GET /" + std::string(40'000, 'a'));
  EXPECT_TRUE(endless.read().starts_with("HTTP/1.1 431 "));
  Client garbage(server.port());
  garbage.send("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n");
  EXPECT_TRUE(garbage.read().starts_with("HTTP/1.1 400 "));
}

TEST(StatusServer, ConnectionsAreKeptForAFewRequestsAndDroppedWhenIdleOrSlow) {
  HttpOptions o = loopback();
  o.limit = milliseconds(400);
  o.max_requests = 3;
  const StatusThread server(o, sample_report);
  const std::string ask = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
  Client kept(server.port());
  kept.send(ask + ask + ask + ask);  // more than it will get
  const std::string all = kept.read();
  size_t answers = 0;
  for (size_t at = 0; (at = all.find("HTTP/1.1 200", at)) != std::string::npos; ++at) ++answers;
  EXPECT_EQ(answers, 3u);
  EXPECT_NE(all.find("Connection: close"), std::string::npos);
  Client idle(server.port()), slow(server.port());
  slow.send("GET /healthz HT");
  EXPECT_EQ(idle.read(), "");
  EXPECT_TRUE(idle.ended());
  EXPECT_EQ(slow.read(), "");
  EXPECT_TRUE(slow.ended());
}

TEST(StatusServer, ACrowdOfIdleConnectionsKeepsNobodyOut) {
  HttpOptions o = loopback();
  o.max_connections = 16;
  const StatusThread server(o, sample_report);
  std::vector<std::unique_ptr<Client>> crowd;
  for (int i = 0; i < 200; ++i) crowd.push_back(std::make_unique<Client>(server.port()));
  EXPECT_TRUE(get(server.port(), "/healthz").starts_with("HTTP/1.1 200 "));
  EXPECT_GE(server.counts().refused, 200u - 16u);
}

TEST(StatusServer, IsRefusedByNameWhereItCannotListen) {
  const auto why = [](const std::string& listen) {
    return thrown_by([&] { StatusThread({.listen = listen}, sample_report); });
  };
  EXPECT_NE(why("8080").find("http.listen: '8080' is no address"), std::string::npos);
  EXPECT_NE(why("127.0.0.1:99999").find("no address"), std::string::npos);
  const StatusThread taken(loopback(), sample_report);
  const std::string there = "127.0.0.1:" + std::to_string(taken.port());
  EXPECT_NE(why(there).find("http.listen " + there), std::string::npos);
}

}  // namespace
}  // namespace certkv::test
