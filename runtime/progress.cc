#include "runtime/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "kernels/base/log.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

constexpr double kBarSeconds = 0.2;
constexpr int kBarCells = 24;

double seconds_between(Progress::Clock::time_point a, Progress::Clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

int terminal_columns(int fd) {
  struct winsize size {};
  return ::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 80;
}

}  // namespace

std::string duration_text(double seconds) {
  if (!(seconds >= 0 && seconds < 1e8)) return "--";
  const auto s = int64_t(std::ceil(seconds));
  return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

std::string progress_bar(uint64_t finished, uint64_t lines, int cells) {
  const int full = lines == 0 ? 0 : int(uint64_t(cells) * std::min(finished, lines) / lines);
  return "[" + std::string(size_t(full), '#') + std::string(size_t(cells - full), '.') + "]";
}

std::string progress_text(const ProgressState& s, double elapsed, double rate) {
  std::string text = fmt::format("requests {}/{}", s.finished, s.lines);
  if (s.failed != 0) text += fmt::format(", {} failed", s.failed);
  text += fmt::format(", {} running", s.running);
  if (s.prefill >= 0) text += fmt::format(", prefill {:.0f}%", 100 * s.prefill);
  const uint64_t now = s.finished - std::min(s.finished, s.finished_before);
  const double left = double(s.lines - std::min(s.lines, s.finished));
  const double eta = now == 0 ? -1 : elapsed * left / double(now);
  text += fmt::format(" | {:.1f} tokens/s | ETA {}", rate, duration_text(eta));
  text +=
      fmt::format(" | worst bound {} ({})", upper_text(s.worst_relative), policy_name(s.policy));
  if (s.counts.head_steps != 0) {
    text += " | rungs";
    for (size_t r = 0; r < s.counts.rungs.size(); ++r) {
      text += fmt::format(" {}: {:.1f}%", r,
                          100 * double(s.counts.rungs[r]) / double(s.counts.head_steps));
    }
  }
  return text;
}

Progress::Progress(int fd, bool terminal, double interval_seconds, Clock::time_point now)
    : fd_(fd), terminal_(terminal), interval_(interval_seconds), start_(now), last_(now) {}

void Progress::print(const ProgressState& state, Clock::time_point now, bool last) {
  const double elapsed = seconds_between(start_, now), window = seconds_between(last_, now);
  // Of the last window; of the whole session at the end.
  const double rate = last ? double(state.tokens) / std::max(elapsed, 1e-9)
                           : double(state.tokens - last_tokens_) / std::max(window, 1e-9);
  std::string text = progress_text(state, elapsed, rate);
  last_ = now;
  last_tokens_ = state.tokens;
  if (!terminal_) {
    log_info("{}", text);
    return;
  }
  text = progress_bar(state.finished, state.lines, kBarCells) + " " + text;
  const size_t columns = size_t(terminal_columns(fd_)) - 1;
  if (text.size() > columns) text.resize(columns);
  text = "\r" + text + "\x1b[K" + (last ? "\n" : "");
  if (::write(fd_, text.data(), text.size()) < 0) return;
}

void Progress::update(const ProgressState& state, Clock::time_point now) noexcept {
  const double interval = terminal_ ? kBarSeconds : interval_;
  if (!(interval > 0) || seconds_between(last_, now) < interval) return;
  try {
    print(state, now, false);
  } catch (...) {
  }
}

void Progress::close(const ProgressState& state, Clock::time_point now) noexcept {
  if (!terminal_ && !(interval_ > 0)) return;
  try {
    print(state, now, true);
  } catch (...) {
  }
}

}  // namespace certkv
