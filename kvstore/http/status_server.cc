#include "kvstore/http/status_server.h"

#include "kernels/base/asio.h"

#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/read.hpp>
#include <boost/beast/http/string_body.hpp>
#include <boost/beast/http/write.hpp>

#include <atomic>
#include <list>
#include <optional>
#include <utility>

#include "kernels/base/deadline.h"
#include "kernels/base/error.h"
#include "kernels/base/log.h"
#include "kvstore/listen.h"

namespace certkv {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using Tcp = asio::ip::tcp;
using ErrorCode = boost::system::error_code;
using std::chrono::milliseconds;

constexpr milliseconds kAcceptPause{50};
constexpr char kPolicy[] =
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src "
    "'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

// "localhost:8080" -> "localhost", "[::1]:8080" -> "[::1]".
beast::string_view host_of(beast::string_view header) {
  if (!header.empty() && header.front() == '[') {
    const size_t end = header.find(']');
    return end == beast::string_view::npos ? header : header.substr(0, end + 1);
  }
  return header.substr(0, std::min(header.find(':'), header.size()));
}
bool names_loopback(beast::string_view host) {
  return beast::iequals(host, "localhost") || host == "[::1]" || host.starts_with("127.");
}

struct Answer {
  http::status status = http::status::ok;
  std::string type = "text/plain; charset=utf-8";
  std::string body;
};

}  // namespace

struct StatusServer::State : std::enable_shared_from_this<State> {
  State(asio::io_context& i, HttpOptions o, Source s)
      : io(i),
        options(std::move(o)),
        source(std::move(s)),
        acceptor(listen_on(io, options.listen, "http.listen")),
        pause(io) {
    local = acceptor.local_endpoint();
    loopback = local.address().is_loopback();
    if (!loopback)
      log_warning("http: {} is no loopback address: whoever reaches it reads this process's status",
                  options.listen);
  }

  void accept();
  void stop();
  Answer answer(beast::string_view target) const;

  asio::io_context& io;
  const HttpOptions options;
  const Source source;
  Tcp::acceptor acceptor;
  asio::steady_timer pause;
  Tcp::endpoint local;
  bool loopback = false, stopped = false;
  std::list<std::shared_ptr<Connection>> connections;  // in the order of their last request
  std::atomic<uint64_t> accepted{0}, requests{0}, refused{0};
};

class StatusServer::Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(std::shared_ptr<State> state, Tcp::socket socket)
      : state_(std::move(state)),
        stream_(std::move(socket)),
        buffer_(state_->options.max_header_bytes + 1024) {}

  void read() {
    idle_ = true;
    parser_.emplace();
    parser_->header_limit(uint32_t(state_->options.max_header_bytes));
    stream_.expires_after(state_->options.limit * kDeadlineFactor);
    http::async_read_header(
        stream_, buffer_, *parser_, [self = shared_from_this()](ErrorCode error, size_t) {
          if (self->closed_) return;
          self->idle_ = false;
          if (!error) return self->handle();
          if (error == http::error::header_limit || error == http::error::buffer_overflow)
            return self->refuse(http::status::request_header_fields_too_large,
                                "the header is too long\n");
          // Only what is there and wrong gets an answer, not what ended.
          const auto& parsing = http::make_error_code(http::error::end_of_stream).category();
          if (error.category() == parsing && error != http::error::end_of_stream &&
              error != http::error::partial_message)
            return self->refuse(http::status::bad_request, "this is no request\n");
          self->close();
        });
  }
  void close() {
    if (std::exchange(closed_, true)) return;
    const auto self = shared_from_this();
    ErrorCode ignored;
    stream_.socket().close(ignored);
    stream_.cancel();
    state_->connections.remove(self);
  }
  bool idle() const { return idle_; }

 private:
  void handle() {
    ++state_->requests;
    ++served_;
    // This one was heard last.
    auto& all = state_->connections;
    all.remove(shared_from_this());
    all.push_back(shared_from_this());
    const auto& request = parser_->get();
    head_ = request.method() == http::verb::head;
    if (request.method() != http::verb::get && !head_)
      return refuse(http::status::method_not_allowed, "only GET and HEAD are served\n");
    if (request.version() > 11 || request.version() < 10)
      return refuse(http::status::http_version_not_supported, "HTTP/1.0 or HTTP/1.1 is needed\n");
    if (parser_->chunked() || parser_->content_length().value_or(0) != 0)
      return refuse(http::status::payload_too_large, "a request has no body here\n");
    if (state_->loopback && !names_loopback(host_of(request[http::field::host])))
      return refuse(http::status::misdirected_request,
                    "this address is for localhost: the Host header names another\n");
    close_after_ = !request.keep_alive() || served_ >= state_->options.max_requests;
    write(state_->answer(request.target()));
  }
  void refuse(http::status status, const char* text) {
    ++state_->refused;
    close_after_ = true;
    write({status, "text/plain; charset=utf-8", text});
  }
  void write(Answer a) {
    response_ = {};
    response_.version(11);
    response_.result(a.status);
    response_.set(http::field::content_type, a.type);
    response_.set(http::field::cache_control, "no-store");
    response_.set("X-Content-Type-Options", "nosniff");
    response_.set("Content-Security-Policy", kPolicy);
    response_.set("Referrer-Policy", "no-referrer");
    if (a.status == http::status::method_not_allowed)
      response_.set(http::field::allow, "GET, HEAD");
    response_.keep_alive(!close_after_);
    response_.content_length(a.body.size());
    if (!head_) response_.body() = std::move(a.body);
    stream_.expires_after(state_->options.limit * kDeadlineFactor);
    serializer_.emplace(response_);
    const auto done = [self = shared_from_this()](ErrorCode error, size_t) {
      if (self->closed_) return;
      if (error || self->close_after_) return self->finish(error);
      self->read();
    };
    if (head_) {
      http::async_write_header(stream_, *serializer_, done);
    } else {
      http::async_write(stream_, *serializer_, done);
    }
  }
  // Says that nothing more comes, and waits (within the limit) until the other side has read it: to
  // close with unread bytes would take the answer away.
  void finish(ErrorCode error) {
    if (error) return close();
    ErrorCode ignored;
    stream_.socket().shutdown(Tcp::socket::shutdown_send, ignored);
    drain();
  }
  void drain() {
    if (drained_ > 64 * 1024) return close();
    stream_.async_read_some(asio::buffer(waste_),
                            [self = shared_from_this()](ErrorCode error, size_t bytes) {
                              if (self->closed_) return;
                              if (error) return self->close();
                              self->drained_ += bytes;
                              self->drain();
                            });
  }

  const std::shared_ptr<State> state_;
  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::empty_body>> parser_;
  http::response<http::string_body> response_;
  std::optional<http::response_serializer<http::string_body>> serializer_;
  std::array<char, 4096> waste_{};
  size_t drained_ = 0;
  unsigned served_ = 0;
  bool head_ = false, close_after_ = false, closed_ = false, idle_ = false;
};

void StatusServer::State::accept() {
  acceptor.async_accept([s = shared_from_this()](ErrorCode error, Tcp::socket socket) {
    if (s->stopped) return;
    if (error) {  // out of descriptors, most likely: later, instead of spinning
      s->pause.expires_after(kAcceptPause);
      return s->pause.async_wait([s](ErrorCode) {
        if (!s->stopped) s->accept();
      });
    }
    close_on_exec(socket.native_handle());
    ++s->accepted;
    if (s->connections.size() >= s->options.max_connections) {
      for (const auto& c : s->connections) {
        if (!c->idle()) continue;
        ++s->refused;
        c->close();
        break;
      }
    }
    if (s->connections.size() < s->options.max_connections) {
      s->connections.push_back(std::make_shared<Connection>(s, std::move(socket)));
      s->connections.back()->read();
    } else {
      ++s->refused;  // all are being answered; the socket closes
    }
    s->accept();
  });
}

void StatusServer::State::stop() {
  if (std::exchange(stopped, true)) return;
  ErrorCode ignored;
  acceptor.close(ignored);
  pause.cancel();
  for (const auto& c : std::list(connections)) c->close();
}

Answer StatusServer::State::answer(beast::string_view target) const {
  const beast::string_view path = target.substr(0, std::min(target.find('?'), target.size()));
  try {
    if (path == "/") return {http::status::ok, "text/html; charset=utf-8", status_page()};
    if (path == "/healthz") return {http::status::ok, "text/plain; charset=utf-8", "ok\n"};
    if (path == "/readyz") {
      const StatusReport r = source();
      if (r.ready) return {http::status::ok, "text/plain; charset=utf-8", "ready\n"};
      return {http::status::service_unavailable, "text/plain; charset=utf-8", r.reason + "\n"};
    }
    if (path == "/metrics")
      return {http::status::ok, "text/plain; version=0.0.4; charset=utf-8", metrics_text(source())};
    if (path == "/v1/status") return {http::status::ok, "application/json", status_json(source())};
  } catch (const std::exception& e) {
    log_warning("http: {}", e.what());
    return {http::status::internal_server_error, "text/plain; charset=utf-8",
            "the status could not be read; the log says why\n"};
  }
  return {http::status::not_found, "text/plain; charset=utf-8",
          "there are /, /healthz, /readyz, /metrics and /v1/status\n"};
}

StatusServer::StatusServer(asio::io_context& io, HttpOptions options, Source source)
    : state_(std::make_shared<State>(io, std::move(options), std::move(source))) {
  state_->accept();
}

StatusServer::~StatusServer() {
  state_->stop();
}

uint16_t StatusServer::port() const {
  return state_->local.port();
}

std::string StatusServer::url() const {
  const std::string host = state_->local.address().to_string();
  const bool v6 = state_->local.address().is_v6();
  return fmt::format("http://{}{}{}:{}/", v6 ? "[" : "", host, v6 ? "]" : "", port());
}

StatusServer::Counts StatusServer::counts() const {
  return {state_->accepted, state_->requests, state_->refused};
}

StatusThread::StatusThread(HttpOptions options, StatusServer::Source source)
    : server_(std::make_unique<StatusServer>(io_, std::move(options), std::move(source))),
      thread_([this] { io_.run(); }) {}

StatusThread::~StatusThread() {
  io_.stop();
  thread_.join();
  server_.reset();
  io_.restart();
  io_.poll();  // what was under way ends with the closed sockets
}

}  // namespace certkv
