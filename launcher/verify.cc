// certkv verify: checks an audit against the originals it holds, apart from the code that made it.
#include "runtime/audit/verify.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "launcher/commands.h"
#include "runtime/options_io.h"
#include "runtime/progress.h"

namespace certkv {
namespace {

// As `certkv run` shows it: a bar on a terminal, else a line from time to time.
class VerifyProgress {
 public:
  explicit VerifyProgress(double interval) : terminal_(::isatty(2) != 0), interval_(interval) {}

  void update(const char* what, uint64_t done, uint64_t total) {
    const auto now = Clock::now();
    if (what != what_) start_ = now;  // the next phase
    const bool fresh = what != what_;
    what_ = what;
    const double wait = terminal_ ? 0.2 : interval_;
    if (!(wait > 0) || (!fresh && seconds(last_, now) < wait && done != total)) return;
    if (!terminal_ && seconds(last_, now) < wait) return;
    last_ = now;
    const double elapsed = seconds(start_, now);
    const double left =
        done == 0 ? -1 : elapsed * double(total - std::min(done, total)) / double(done);
    const bool bytes = std::string_view(what) == "chain";
    const std::string count =
        bytes ? fmt::format("{:.0f}/{:.0f} MB", double(done) / 1e6, double(total) / 1e6)
              : fmt::format("{}/{}", done, total);
    const std::string text = fmt::format("{} {} | ETA {}", what, count, duration_text(left));
    if (terminal_)
      fmt::print(stderr, "\r{} {}\x1b[K{}", progress_bar(done, total, 24), text,
                 done == total ? "\n" : "");
    else
      fmt::print(stderr, "certkv verify: {}\n", text);
    std::fflush(stderr);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static double seconds(Clock::time_point a, Clock::time_point b) {
    return std::chrono::duration<double>(b - a).count();
  }
  bool terminal_;
  double interval_;
  const char* what_ = nullptr;
  Clock::time_point start_ = Clock::now(), last_ = start_;
};

void print_result(const audit::VerifyResult& r, const std::string& folder) {
  for (const audit::FileSummary& f : r.files)
    fmt::print("{}: {} bytes, {} links, {} records, digest {}{}{}\n", f.path, f.bytes, f.links,
               f.records, audit::hex(f.digest), f.broken.empty() ? "" : "; ", f.broken);
  fmt::print("\n{:<8} {:<10} {:>10} {:>17} {:>8} {:>13} {:>23} {:>7}\n", "policy", "outcome",
             "head-steps", "worst true/bound", "mean", "worst true/S", "recomputed/bound: least",
             "mean");
  for (const auto& [key, t] : r.tightness) {
    const double n = double(std::max<uint64_t>(t.head_steps, 1));
    fmt::print("{:<8} {:<10} {:>10} {:>17.3g} {:>8.3g} {:>13.3g} {:>23.4f} {:>7.4f}\n", key.first,
               key.second, t.head_steps, t.worst, t.sum / n, t.worst_error, t.least_due,
               t.due_sum / n);
  }
  for (const audit::Violation& v : r.listed)
    fmt::print("violation of {}: {}: {}\n", v.rule, v.where, v.text);
  if (r.violations > r.listed.size())
    fmt::print("... and {} more\n", r.violations - r.listed.size());
  fmt::print("\n{}: {} sequences, {} records, {} head-steps checked, {} violations\n", folder,
             r.sequences, r.records, r.head_steps, r.violations);
}

}  // namespace

int verify_command(Args& args) {
  audit::VerifyOptions options;
  int64_t threads = 0, listed = 20;
  double progress_seconds = 5;
  OptionTable table;
  table.add("threads", &threads,
            {.meaning = "threads; 0: cores of this machine",
             .unit = "threads",
             .cost = "memory for the originals of one more KV head of a sequence",
             .min = 0,
             .max = 4096});
  table.add(
      "allow_truncated", &options.allow_truncated,
      {.meaning = "check a file without its end, as a killed job leaves it, as far as it goes"});
  table.add("list", &listed,
            {.meaning = "most violations that are printed",
             .unit = "violations",
             .cost = "longer output",
             .min = 0,
             .max = 1 << 20});
  table.add("progress_seconds", &progress_seconds,
            {.meaning = "between progress lines where standard error is no terminal; 0: none",
             .unit = "seconds",
             .cost = "fewer lines",
             .min = 0,
             .max = kMaxDeadlineSeconds});
  const auto parsed = table.read_arguments(args.values, 1);
  if (parsed.help) {
    fmt::print(
        "usage: certkv verify FOLDER [--key value ...]\n\nRecomputes, in float64 and from the "
        "originals in an audit folder, the true error and the bound of every recorded head-step. "
        "Exit code 0: all hold; 3: a violation, or a file that was altered or cut.\n\n{}",
        table.help());
    return kExitDone;
  }
  CERTKV_EXPECT(parsed.positional.size() == 1, InvalidArgument,
                "command line: name the folder of the audit: certkv verify FOLDER");
  options.folder = parsed.positional[0];
  options.max_listed = size_t(listed);
  options.threads =
      threads > 0 ? int(threads) : std::max(1, int(std::thread::hardware_concurrency()));
  VerifyProgress progress(progress_seconds);
  options.progress = [&](const char* what, uint64_t done, uint64_t total) {
    progress.update(what, done, total);
  };
  const audit::VerifyResult result = audit::verify_folder(options);
  print_result(result, options.folder);
  return result.violations == 0 ? kExitDone : kExitNo;
}

}  // namespace certkv
