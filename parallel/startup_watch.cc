#include "parallel/startup_watch.h"

#include <fmt/core.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "parallel/topology.h"

namespace certkv {
namespace {

constexpr size_t kMostRanks = 65536;  // of a host, before a launcher's list is not believed

std::string text_in(const char* variable) {
  const char* text = std::getenv(variable);
  return text == nullptr ? std::string() : std::string(text);
}

int number_of(std::string_view text) {
  int value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? value : -1;
}

// "3,4,7" as Slurm writes SLURM_GTIDS.
std::vector<int> numbers_of(std::string_view text) {
  std::vector<int> list;
  while (!text.empty() && list.size() < kMostRanks) {
    const size_t comma = std::min(text.find(','), text.size());
    const int value = number_of(text.substr(0, comma));
    if (value < 0) return {};
    list.push_back(value);
    text.remove_prefix(std::min(text.size(), comma + 1));
  }
  return list;
}

// Letters, digits and dashes of a job's name, so that it can stand in a socket's.
std::string plain(const std::string& text) {
  std::string out;
  for (const char c : text.substr(0, 48))
    out += std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '-';
  return out;
}

std::string prefix_of(const StartupPlace& place) {
  return fmt::format("certkv-start-{}-{}.", getuid(), plain(place.job));
}

int leave_mark(const StartupPlace& place) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string name = fmt::format("{}{}.{}", prefix_of(place), place.local_rank, place.rank);
  if (name.size() + 1 >= sizeof address.sun_path) return -1;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const auto length = socklen_t(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  if (fd >= 0 && bind(fd, reinterpret_cast<const sockaddr*>(&address), length) == 0) return fd;
  if (fd >= 0) close(fd);
  return -1;
}

std::vector<Arrival> marks_of(const StartupPlace& place) {
  std::vector<Arrival> list;
  std::ifstream sockets("/proc/net/unix");
  const std::string prefix = "@" + prefix_of(place);
  std::string line;
  while (std::getline(sockets, line)) {
    const size_t at = line.find(prefix);
    if (at == std::string::npos) continue;
    const std::string_view rest = std::string_view(line).substr(at + prefix.size());
    const size_t dot = rest.find('.');
    if (dot == std::string_view::npos) continue;
    const Arrival a{number_of(rest.substr(0, dot)), number_of(rest.substr(dot + 1))};
    if (a.local_rank >= 0 && a.rank >= 0) list.push_back(a);
  }
  return list;
}

}  // namespace

StartupPlace startup_place() {
  StartupPlace p;
  if (std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr) {
    p.job = text_in("PMIX_NAMESPACE");
    p.rank = number_of(text_in("OMPI_COMM_WORLD_RANK"));
    p.size = number_of(text_in("OMPI_COMM_WORLD_SIZE"));
    p.local_rank = number_of(text_in("OMPI_COMM_WORLD_LOCAL_RANK"));
    p.local_size = number_of(text_in("OMPI_COMM_WORLD_LOCAL_SIZE"));
  } else if (std::getenv("SLURM_PROCID") != nullptr && std::getenv("SLURM_STEP_ID") != nullptr) {
    p.job = text_in("SLURM_JOB_ID") + "-" + text_in("SLURM_STEP_ID");
    p.rank = number_of(text_in("SLURM_PROCID"));
    p.size = number_of(text_in("SLURM_STEP_NUM_TASKS"));
    p.local_rank = number_of(text_in("SLURM_LOCALID"));
    p.host_ranks = numbers_of(text_in("SLURM_GTIDS"));
    p.local_size = int(p.host_ranks.size());
  }
  return p;
}

std::string startup_diagnosis(const StartupPlace& place, const std::vector<Arrival>& arrivals,
                              const std::string& host, std::chrono::milliseconds limit) {
  const double seconds = double(limit.count()) / 1000;
  const auto rank_at = [&](int local) -> std::string {
    if (place.host_ranks.size() == size_t(place.local_size))
      return fmt::format("rank {}", place.host_ranks[size_t(local)]);
    // Ranks of a host usually follow one another; those that came tell whether these do.
    const int first = place.rank - place.local_rank;
    const bool follow = std::all_of(arrivals.begin(), arrivals.end(), [&](const Arrival& a) {
      return a.rank - a.local_rank == first;
    });
    return follow ? fmt::format("rank {}", first + local) : fmt::format("local rank {}", local);
  };
  std::string missing;
  int here = 0;
  for (int l = 0; l < place.local_size; ++l) {
    const bool came = std::any_of(arrivals.begin(), arrivals.end(),
                                  [&](const Arrival& a) { return a.local_rank == l; });
    here += came ? 1 : 0;
    if (!came) missing += (missing.empty() ? "" : ", ") + rank_at(l);
  }
  if (missing.empty())
    return fmt::format(
        "start-up: after {:g} s all {} rank(s) of host {} are here, but not all {} of the job: "
        "another host's did not come (see its lines, and the launcher's)",
        seconds, place.local_size, host, place.size);
  return fmt::format(
      "start-up: {} on host {} did not come within {:g} s ({} of this host's {} ranks "
      "are here): see parallel.start_seconds",
      missing, host, seconds, here, place.local_size);
}

StartupWatch::StartupWatch(StartupPlace place, std::chrono::milliseconds limit,
                           std::function<void(const std::string&)> late)
    : place_(std::move(place)), limit_(limit), late_(std::move(late)) {
  if (!place_.known() || limit_.count() <= 0) return;
  mark_ = leave_mark(place_);
  thread_ = std::thread([this] { watch(); });
}

void StartupWatch::watch() {
  std::unique_lock lock(mutex_);
  if (met_.wait_for(lock, limit_, [this] { return done_; })) return;
  lock.unlock();
  const std::vector<Arrival> arrivals = marks_of(place_);
  const bool first = std::all_of(arrivals.begin(), arrivals.end(), [this](const Arrival& a) {
    return a.local_rank >= place_.local_rank;
  });
  late_(first ? startup_diagnosis(place_, arrivals, host_name(), limit_) : std::string());
}

StartupWatch::~StartupWatch() {
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
  }
  met_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (mark_ >= 0) close(mark_);
}

}  // namespace certkv
