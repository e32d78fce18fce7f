// Logging to standard error as `[time][level][host:rank] text`. Whoever decides an error logs it,
// once. Logging never throws and never blocks a step for longer than a write to standard error.
#pragma once

#include <fmt/core.h>

#include <string_view>

namespace certkv {

enum class LogLevel { Debug, Info, Warning, Error };

void log_set_level(LogLevel level);
void log_set_rank(int rank);  // -1 (default): no rank known yet, prints the host name alone
void log_set_name(std::string_view name);  // in the place of a rank, for other processes
void log_line(LogLevel level, std::string_view text) noexcept;

template <typename... Args>
void log_debug(fmt::format_string<Args...> f, Args&&... args) {
  log_line(LogLevel::Debug, fmt::format(f, std::forward<Args>(args)...));
}
template <typename... Args>
void log_info(fmt::format_string<Args...> f, Args&&... args) {
  log_line(LogLevel::Info, fmt::format(f, std::forward<Args>(args)...));
}
template <typename... Args>
void log_warning(fmt::format_string<Args...> f, Args&&... args) {
  log_line(LogLevel::Warning, fmt::format(f, std::forward<Args>(args)...));
}
template <typename... Args>
void log_error(fmt::format_string<Args...> f, Args&&... args) {
  log_line(LogLevel::Error, fmt::format(f, std::forward<Args>(args)...));
}

}  // namespace certkv
