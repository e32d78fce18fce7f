#include "kernels/base/failpoint.h"

#if CERTKV_FAILPOINTS

#include <fcntl.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/base/error.h"

namespace certkv::failpoint {

constinit std::array<std::atomic<uint32_t>, size_t(Point::kCount)> armed{};

namespace {

enum class Action { Panic, Error, Sleep, Corrupt, Force, Nan };
constexpr std::array<std::string_view, 6> kActions = {"panic",   "error", "sleep",
                                                      "corrupt", "force", "nan"};

struct Setting {
  Action action = Action::Panic;
  ErrorKind kind = ErrorKind::IoError;
  std::chrono::milliseconds pause{0};
  uint64_t skip = 0, count = UINT64_MAX, seed = 1;
  double probability = 1;
  uint64_t hits = 0, fired = 0;
  bool set = false;
};

struct State {
  std::mutex mutex;
  std::array<Setting, size_t(Point::kCount)> settings;
};
State& state() {
  static State* the = new State;  // outlives every static that may still meet a point
  return *the;
}

uint64_t mix(uint64_t x) {  // splitmix64's finaliser
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

template <typename T>
T number(std::string_view text, std::string_view what) {
  T x{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
  CERTKV_EXPECT(error == std::errc() && end == text.data() + text.size(), InvalidArgument,
                "failpoint: {} '{}' is no number", what, text);
  return x;
}

std::vector<std::string_view> split(std::string_view text, char by) {
  std::vector<std::string_view> parts;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(by, at), text.size());
    parts.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

// Of this process in its job; -1 outside of one. The store inherits it from the rank that began it.
int64_t own_rank() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"})
    if (const char* value = std::getenv(name)) return std::atoll(value);
  return -1;
}

ErrorKind kind_of(std::string_view name) {
  for (int k = 0; k <= int(ErrorKind::Stopped); ++k)
    if (name == error_kind_name(ErrorKind(k))) return ErrorKind(k);
  CERTKV_THROW(InvalidArgument, "failpoint: there is no error kind '{}'", name);
}

bool allows(const Row& row, std::string_view action) {
  for (std::string_view word : split(row.actions, ' '))
    if (word == action) return true;
  return false;
}

// One "NAME=ACTION,key=value,..".
void set_one(std::string_view text) {
  const size_t equals = text.find('=');
  const std::string_view name = text.substr(0, equals);
  size_t point = 0;
  while (point < table().size() && table()[point].name != name) ++point;
  CERTKV_EXPECT(point < table().size() && equals != text.npos, InvalidArgument,
                "failpoint: '{}' is not NAME=ACTION with one of the names that `certkv doctor "
                "--failpoints` lists",
                text);
  const auto parts = split(text.substr(equals + 1), ',');
  const size_t colon = parts[0].find(':');
  const std::string_view word = parts[0].substr(0, colon);
  const std::string_view detail =
      colon == parts[0].npos ? std::string_view() : parts[0].substr(colon + 1);
  CERTKV_EXPECT(allows(table()[point], word), InvalidArgument,
                "failpoint: {} cannot '{}': it can {}", name, word, table()[point].actions);
  Setting s;
  for (size_t a = 0; a < kActions.size(); ++a)
    if (word == kActions[a]) s.action = Action(a);
  if (s.action == Action::Error) s.kind = kind_of(detail);
  if (s.action == Action::Sleep)
    s.pause = std::chrono::milliseconds(number<uint32_t>(detail, "sleep"));
  bool here = true;
  for (size_t i = 1; i < parts.size(); ++i) {
    const size_t at = std::min(parts[i].find('='), parts[i].size());
    const std::string_view key = parts[i].substr(0, at);
    const std::string_view value = parts[i].substr(std::min(at + 1, parts[i].size()));
    if (key == "skip") {
      s.skip = number<uint64_t>(value, key);
    } else if (key == "count") {
      s.count = number<uint64_t>(value, key);
    } else if (key == "seed") {
      s.seed = number<uint64_t>(value, key);
    } else if (key == "rank") {
      here = number<int64_t>(value, key) == own_rank();
    } else if (key == "probability") {
      s.probability = number<double>(value, key);
      CERTKV_EXPECT(s.probability >= 0 && s.probability <= 1, InvalidArgument,
                    "failpoint: probability {} is not in 0 .. 1", value);
    } else {
      CERTKV_THROW(InvalidArgument,
                   "failpoint: '{}' is none of skip, count, probability, seed, rank", parts[i]);
    }
  }
  if (!here) return;
  const std::lock_guard lock(state().mutex);
  s.set = true;
  state().settings[point] = s;
  armed[point].store(1, std::memory_order_relaxed);
}

void note(const Row& row) {
  const char* path = std::getenv("CERTKV_FAILPOINT_LOG");
  if (path == nullptr) return;
  const int fd = ::open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) return;
  const std::string line = fmt::format("{} {}\n", row.name, ::getpid());
  if (::write(fd, line.data(), line.size()) < 0) std::perror(path);
  ::close(fd);
}

// What to do at this hit; false: nothing. `draw` is the hit's random number.
bool takes(Point point, Setting* now, uint64_t* draw) {
  const std::lock_guard lock(state().mutex);
  Setting& s = state().settings[size_t(point)];
  if (!s.set) return false;
  const uint64_t hit = s.hits++;
  *draw = mix(mix(s.seed) ^ hit);
  if (hit < s.skip || s.fired >= s.count) return false;
  if (!(double(mix(*draw) >> 11) * 0x1p-53 < s.probability)) return false;
  ++s.fired;
  *now = s;
  return true;
}

bool act(Point point, const Setting& s) {
  const Row& row = table()[size_t(point)];
  note(row);
  switch (s.action) {
    case Action::Panic:
      for (;;) ::kill(::getpid(), SIGKILL);
    case Action::Error:
      throw Error(s.kind, fmt::format("failpoint {}", row.name), __FILE__, __LINE__);
    case Action::Sleep:
      std::this_thread::sleep_for(s.pause);
      return false;
    case Action::Corrupt:
    case Action::Force:
    case Action::Nan:
      return true;
  }
  return false;
}

const bool from_environment = [] {
  const char* text = std::getenv("CERTKV_FAILPOINT");
  if (text == nullptr) return false;
  try {
    set(text);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "CERTKV_FAILPOINT: %s\n", e.what());
    ::_exit(2);
  }
  return true;
}();

}  // namespace

std::span<const Row> table() {
  static const std::vector<Row>* rows = [] {
    auto* list = new std::vector<Row>{
#define CERTKV_FAILPOINT_ROW(point, actions, holds) {#point, actions, holds},
#include "kernels/base/failpoints.inc"
#undef CERTKV_FAILPOINT_ROW
    };
    for (Row& row : *list) row.name[row.name.find('_')] = '.';
    return list;
  }();
  return *rows;
}

void set(std::string_view text) {
  for (std::string_view one : split(text, ';'))
    if (!one.empty()) set_one(one);
}

void clear() {
  const std::lock_guard lock(state().mutex);
  for (auto& a : armed) a.store(0, std::memory_order_relaxed);
  for (Setting& s : state().settings) s = {};
}

uint64_t fired(std::string_view name) {
  const std::lock_guard lock(state().mutex);
  for (size_t i = 0; i < table().size(); ++i)
    if (table()[i].name == name) return state().settings[i].fired;
  CERTKV_THROW(InvalidArgument, "failpoint: there is none called '{}'", name);
}

bool fire(Point point) {
  Setting s;
  uint64_t draw = 0;
  return takes(point, &s, &draw) && act(point, s);
}

void change(Point point, void* bytes, size_t count) {
  Setting s;
  uint64_t draw = 0;
  if (!takes(point, &s, &draw) || !act(point, s) || count == 0) return;
  auto* at = static_cast<unsigned char*>(bytes);
  if (s.action == Action::Nan && count >= 4) {
    std::memset(at + draw % (count / 4) * 4, 0xff, 4);
  } else {
    at[draw % count] ^= uint8_t(1u << (mix(draw) & 7));
  }
}

}  // namespace certkv::failpoint

#endif
