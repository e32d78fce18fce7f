#include "kernels/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <string>

namespace certkv {
namespace {

struct Logger {
  Logger() {
    char name[256] = {};
    gethostname(name, sizeof name - 1);
    host = name;
    log = std::make_shared<spdlog::logger>("certkv",
                                           std::make_shared<spdlog::sinks::stderr_sink_mt>());
    log->set_error_handler([](const std::string&) {});  // a full disk must not end a step
    set_rank(-1);
  }
  void set_rank(int rank) { set_name(rank < 0 ? std::string() : std::to_string(rank)); }
  void set_name(const std::string& name) {
    const std::string who = name.empty() ? host : host + ":" + name;
    log->set_pattern("[%Y-%m-%dT%H:%M:%S.%e][%l][" + who + "] %v");
  }
  std::string host;
  std::shared_ptr<spdlog::logger> log;
};

Logger& logger() {
  static Logger* the = new Logger;  // outlives every static that may still log
  return *the;
}

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::Debug: return spdlog::level::debug;
    case LogLevel::Info: return spdlog::level::info;
    case LogLevel::Warning: return spdlog::level::warn;
    case LogLevel::Error: return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void log_set_level(LogLevel level) { logger().log->set_level(to_spdlog(level)); }
void log_set_rank(int rank) { logger().set_rank(rank); }
void log_set_name(std::string_view name) { logger().set_name(std::string(name)); }
void log_line(LogLevel level, std::string_view text) noexcept {
  try {
    logger().log->log(to_spdlog(level), spdlog::string_view_t(text.data(), text.size()));
  } catch (...) {
  }
}

}  // namespace certkv
