// The store as a process of its own: started, killed, stopped, left alone.
//
// This program is also the store that it starts (`<program> store ...`) and a rank that it can kill
// (`<program> rank SOCKET`).
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "kernels/base/error.h"
#include "kvstore/store_process.h"
#include "kvstore/unique_fd.h"
#include "tests/kvstore/store_support.h"

namespace certkv::test {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kSilence{5000};

StoreProcessOptions quick() {
  StoreProcessOptions o;
  o.arena_bytes = uint64_t(1) << 20;
  o.linger = milliseconds(200);
  return o;
}

std::shared_ptr<StoreClient> attach(const SpawnedStore& store, int rank = 0,
                                    milliseconds silence = kSilence) {
  StoreClientOptions o;
  o.socket = store.socket;
  o.rank = rank;
  o.deadline = silence;
  o.heartbeat = milliseconds(50);
  return StoreClient::attach(o, patience());
}

ReserveRequest small_request(uint32_t blocks = 2) {
  ReserveRequest r;
  r.owner = private_owner();
  r.shape = small_shape();
  r.blocks = blocks;
  return r;
}

ReserveRequest shared_request() {
  ReserveRequest r = small_request(8);
  r.owner = {uint64_t(1) << 63, 42};
  return r;
}

// The store is nobody's child here, so its end shows in /proc; a zombie counts as ended.
bool running(int64_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const size_t end = text.rfind(')');
  return end != std::string::npos && end + 2 < text.size() && text[end + 2] != 'Z';
}

bool socket_exists(const std::string& name) {
  std::ifstream in("/proc/net/unix");
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  return text.find(name) != std::string::npos;
}

// What a store could have left: its names begin with certkv-UID-. Folders of tests that run beside
// this one are named otherwise.
std::set<std::string> files_in(const char* folder) {
  const std::string ours = "certkv-" + std::to_string(getuid()) + "-";
  std::set<std::string> names;
  for (const auto& e : std::filesystem::directory_iterator(folder)) {
    const std::string name = e.path().filename();
    if (name.find(ours) != std::string::npos) names.insert(name);
  }
  return names;
}

// Another process that runs `<this program> role socket`.
class Child {
 public:
  Child(const char* role, const std::string& socket) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return;
    output_ = UniqueFd(ends[0]);
    const UniqueFd theirs(ends[1]);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(theirs.get(), STDOUT_FILENO);
      execl("/proc/self/exe", "store_process_test", role, socket.c_str(), nullptr);
      _exit(127);
    }
  }
  ~Child() {
    if (pid_ > 0) end(SIGKILL);
  }
  // Next line it prints; empty at its end.
  std::string line() {
    std::string text;
    char c = 0;
    while (read(output_.get(), &c, 1) == 1 && c != '\n') text += c;
    return text;
  }
  int end(int signal) {
    int status = 0;
    if (signal != 0) kill(pid_, signal);
    waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }

 private:
  pid_t pid_ = -1;
  UniqueFd output_;
};

TEST(StoreProcess, StartsServesAndEndsAfterTheLastRank) {
  const SpawnedStore store = spawn_store(quick(), kSilence);
  ASSERT_TRUE(running(store.pid));
  EXPECT_NE(getsid(pid_t(store.pid)), getsid(0)) << "it needs a session of its own";
  auto client = attach(store);
  EXPECT_EQ(client->store_pid(), store.pid);
  OriginalsSpan span = client->reserve(small_request());
  seal_known(span, 0, 0, 1);
  EXPECT_EQ(read_copy(*client->reader(), span.id(0, 0, 1), small_shape()).k,
            known_rows(small_shape(), 0, 0, 1, false));
  span.reset();
  client.reset();
  EXPECT_TRUE(
      eventually([&] { return !running(store.pid) && !socket_exists(store.socket.substr(1)); }));
}

TEST(StoreProcess, EndsWhenNobodyAttaches) {
  StoreProcessOptions o = quick();
  o.attach_within = milliseconds(100);
  const SpawnedStore store = spawn_store(o, kSilence);
  EXPECT_TRUE(eventually([&] { return !running(store.pid); }));
}

TEST(StoreProcess, KilledItIsNoticedWithinASecondLeavesNothingAndOriginalsStay) {
  const auto shm = files_in("/dev/shm"), tmp = files_in("/tmp");
  const SpawnedStore store = spawn_store(quick(), kSilence);
  auto client = attach(store);
  OriginalsSpan span = client->reserve(small_request());
  seal_known(span, 0, 0, 0);
  const auto start = std::chrono::steady_clock::now();
  kill(pid_t(store.pid), SIGKILL);
  ASSERT_TRUE(eventually([&] { return client->lost(); }));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1) * kDeadlineFactor);
  EXPECT_NE(client->lost_reason().find(std::to_string(store.pid)), std::string::npos);
  EXPECT_EQ(read_copy(*client->reader(), span.id(0, 0, 0), small_shape()).k,
            known_rows(small_shape(), 0, 0, 0, false));
  EXPECT_TRUE(eventually([&] { return !socket_exists(store.socket.substr(1)); }));
  EXPECT_EQ(files_in("/dev/shm"), shm);
  EXPECT_EQ(files_in("/tmp"), tmp);

  // A new store knows nothing of the old one's blocks, whatever ids are brought along.
  const BlockId stale = span.id(0, 0, 0);
  const SpawnedStore next = spawn_store(quick(), kSilence);
  auto again = attach(next);
  EXPECT_NE(again->boot_nonce(), client->boot_nonce());
  ReserveRequest same = span.request();
  OriginalsSpan replacement = again->reserve(same);
  seal_known(replacement, 0, 0, 0);
  EXPECT_EQ(read_copy(*again->reader(), stale, small_shape()).result.status, BlockStatus::Absent);
}

TEST(StoreProcess, StoppedItIsLostAfterTheDeadlineOfSilence) {
  const SpawnedStore store = spawn_store(quick(), kSilence);
  auto client = attach(store, 0, milliseconds(400));
  kill(pid_t(store.pid), SIGSTOP);
  EXPECT_THROW(client->capacity(), Error);
  EXPECT_TRUE(eventually([&] { return client->lost(); }));
  EXPECT_NE(client->lost_reason().find("no sign of life"), std::string::npos)
      << client->lost_reason();
  kill(pid_t(store.pid), SIGKILL);
}

TEST(StoreProcess, EndsCleanlyOnSigterm) {
  StoreProcessOptions o = quick();
  std::string folder = "/tmp/store-process-test-XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  o.socket = folder + "/socket";
  const SpawnedStore store = spawn_store(o, kSilence);
  auto client = attach(store);
  ASSERT_TRUE(std::filesystem::exists(o.socket));
  kill(pid_t(store.pid), SIGTERM);
  EXPECT_TRUE(eventually([&] { return client->lost() && !running(store.pid); }));
  EXPECT_FALSE(std::filesystem::exists(o.socket));
  rmdir(folder.c_str());
}

TEST(StoreProcess, OutlivesTheRankThatStartedIt) {
  Child starter("starter", "-");
  const std::string socket = starter.line();
  ASSERT_FALSE(socket.empty());
  auto client = attach({socket, 0});
  starter.end(SIGKILL);
  std::this_thread::sleep_for(milliseconds(500));
  EXPECT_FALSE(client->lost());
  OriginalsSpan span = client->reserve(small_request());
  seal_known(span, 0, 0, 0);
}

TEST(StoreProcess, ADeadRanksSpaceIsKeptUntilOthersNeedIt) {
  const SpawnedStore store = spawn_store(quick(), kSilence);
  auto client = attach(store);
  const uint64_t before = client->capacity().free_bytes;
  Child rank("rank", store.socket);
  ASSERT_EQ(rank.line(), "sealed");
  const uint64_t used = before - client->capacity().free_bytes;
  EXPECT_GT(used, 0u);
  rank.end(SIGKILL);
  ASSERT_TRUE(eventually(
      [&] { return client->status_json().find("\"dead_ranks\":1") != std::string::npos; }));
  EXPECT_EQ(before - client->capacity().free_bytes, used) << "kept for a relaunch";
  EXPECT_FALSE(client->lost());
  // Room for everything but what the dead rank holds: only its eviction, once its grace is over,
  // makes this fit, and what it wrote must be gone.
  const uint32_t all = uint32_t(before / small_shape().slot_bytes());
  OriginalsSpan span;
  ASSERT_TRUE(eventually([&] {
    try {
      span = client->reserve(small_request(all));
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::OutOfMemory);
    }
    return !span.empty();
  }));
  for (uint32_t b = 0; b < all; ++b) ASSERT_FALSE(span.sealed(0, 0, b));
  const auto rows = span.rows(0, 0, all / 2);
  EXPECT_EQ(std::count(rows.k, rows.k + small_shape().elements(), 0),
            std::ptrdiff_t(small_shape().elements()));
}

// What a relaunched job does: another process finds the dead one's blocks by their owner's name.
TEST(StoreProcess, AKilledRanksSealedBlocksAreAdoptedAndTheirDigestsHold) {
  const SpawnedStore store = spawn_store(quick(), kSilence);
  auto client = attach(store);
  Child rank("sharing-rank", store.socket);
  ASSERT_EQ(rank.line(), "sealed");
  rank.end(SIGKILL);
  ASSERT_TRUE(eventually(
      [&] { return client->status_json().find("\"dead_ranks\":1") != std::string::npos; }));
  OriginalsSpan span = client->adopt(shared_request());
  ASSERT_FALSE(span.empty());
  EXPECT_FALSE(span.sealed_throughout());
  for (uint32_t b = 0; b < 8; ++b) {
    const Copied c = read_copy(*client->reader(), span.id(0, 0, b), small_shape());
    if (b == 7) {  // it was killed while it wrote this one: payload without a seal
      EXPECT_EQ(c.result.status, BlockStatus::Absent);
      continue;
    }
    ASSERT_EQ(c.result.status, BlockStatus::Ok);
    EXPECT_EQ(c.k, known_rows(small_shape(), 0, 0, b, false));
    EXPECT_EQ(c.v, known_rows(small_shape(), 0, 0, b, true));
  }
  BlockId stale = span.id(0, 0, 0);
  ++stale.version;
  EXPECT_EQ(read_copy(*client->reader(), stale, small_shape()).result.status, BlockStatus::Absent);
  stale = span.id(0, 0, 0);
  ++stale.boot_nonce;
  EXPECT_EQ(read_copy(*client->reader(), stale, small_shape()).result.status, BlockStatus::Absent);
}

TEST(StoreProcess, ARankThatLeavesInGoodOrderFreesItsSpaceAtOnce) {
  const SpawnedStore store = spawn_store(quick(), kSilence);
  auto client = attach(store);
  const uint64_t before = client->capacity().free_bytes;
  Child rank("rank", store.socket);
  ASSERT_EQ(rank.line(), "sealed");
  rank.end(SIGTERM);
  EXPECT_TRUE(eventually([&] { return client->capacity().free_bytes == before; }));
  EXPECT_NE(client->status_json().find("\"dead_ranks\":0"), std::string::npos);
}

TEST(StoreProcess, InheritsNoDescriptors) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);  // not close-on-exec, like a launcher's
  const SpawnedStore store = spawn_store(quick(), kSilence);
  auto client = attach(store);
  close(ends[1]);
  pollfd p{ends[0], POLLIN, 0};
  ASSERT_EQ(poll(&p, 1, 2000), 1) << "the store holds the other end open";
  char c;
  EXPECT_EQ(read(ends[0], &c, 1), 0);
  close(ends[0]);
}

template <typename Body>
std::string error_of(ErrorKind kind, Body body) {
  try {
    body();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(StoreProcess, WhatKeepsItFromStartingReachesTheRank) {
  StoreProcessOptions o = quick();
  o.arena_bytes = uint64_t(1) << 50;
  const std::string text = error_of(ErrorKind::OutOfMemory, [&] { spawn_store(o, kSilence); });
  EXPECT_NE(text.find("store.arena"), std::string::npos) << text;
  o = quick();
  o.socket = "/nonexistent/folder/socket";
  error_of(ErrorKind::InvalidArgument, [&] { spawn_store(o, kSilence); });
  o = quick();
  o.executable = "/bin/false";
  error_of(ErrorKind::StoreLost, [&] { spawn_store(o, kSilence); });
  o.executable = "/nonexistent/program";
  error_of(ErrorKind::StoreLost, [&] { spawn_store(o, kSilence); });
}

TEST(StoreProcess, OneThatHangsAtItsStartIsEndedAtTheDeadline) {
  setenv("CERTKV_TEST_HANG", "1", 1);
  error_of(ErrorKind::DeadlineExceeded, [] { spawn_store(quick(), milliseconds(200)); });
  unsetenv("CERTKV_TEST_HANG");
}

TEST(StoreProcess, AttachingToNothingEndsAtTheDeadlineWithAdvice) {
  StoreClientOptions o;
  o.socket = random_socket_name();
  const std::string text = error_of(
      ErrorKind::StoreLost, [&] { StoreClient::attach(o, Deadline::after(milliseconds(100))); });
  EXPECT_NE(text.find("certkv store"), std::string::npos) << text;
  o.socket = "";
  error_of(ErrorKind::InvalidArgument,
           [&] { StoreClient::attach(o, Deadline::after(milliseconds(100))); });
}

TEST(StoreProcess, ArgumentsComeBackAsTheyWent) {
  StoreProcessOptions o;
  o.socket = "@x";
  o.arena_bytes = 12345;
  o.linger = milliseconds(-1);
  o.attach_within = milliseconds(77);
  o.max_connections = 9;
  o.ready_fd = 3;
  const StoreProcessOptions p = parse_store_arguments(store_arguments(o));
  EXPECT_EQ(store_arguments(p), store_arguments(o));
  EXPECT_EQ(p.arena_bytes, 12345u);
  EXPECT_EQ(p.linger, milliseconds(-1));
  for (const std::vector<std::string>& bad : {std::vector<std::string>{"--arena-bytes"},
                                              {"--arena-bytes", "12x"},
                                              {"--arena-bytes", "-1"},
                                              {"--arena-bytes", "99999999999999999999"},
                                              {"--nothing", "1"},
                                              {}}) {
    error_of(ErrorKind::InvalidArgument, [&] { parse_store_arguments(bad); });
  }
}

// ---- the other roles of this program ------------------------------------------------------------

volatile std::sig_atomic_t asked_to_leave = 0;

int be_rank(const std::string& socket) {
  std::signal(SIGTERM, [](int) { asked_to_leave = 1; });
  auto client = attach({socket, 0}, 1);
  OriginalsSpan span = client->reserve(small_request(8));
  for (uint32_t b = 0; b < 8; ++b) seal_known(span, 0, 0, b);
  std::puts("sealed");
  std::fflush(stdout);
  for (int i = 0; i < 3000 && asked_to_leave == 0; ++i) usleep(10000);
  return 0;
}

int be_sharing_rank(const std::string& socket) {
  auto client = attach({socket, 0}, 1);
  OriginalsSpan span = client->reserve(shared_request());
  for (uint32_t b = 0; b < 7; ++b) seal_known(span, 0, 0, b);
  const auto rows = span.rows(0, 0, 7);
  rows.k[0] = rows.v[0] = 1;
  std::puts("sealed");
  std::fflush(stdout);
  sleep(30);
  return 0;
}

int be_starter() {
  const SpawnedStore store = spawn_store(quick(), kSilence);
  auto client = attach(store, 1);
  std::puts(store.socket.c_str());
  std::fflush(stdout);
  sleep(30);
  return 0;
}

}  // namespace
}  // namespace certkv::test

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (!words.empty() && words[0] == "store") {
    try {
      const auto options = certkv::parse_store_arguments({words.begin() + 1, words.end()});
      if (std::getenv("CERTKV_TEST_HANG") != nullptr) {
        alarm(20);
        pause();
      }
      return certkv::run_store(options);
    } catch (const certkv::Error& e) {
      std::fprintf(stderr, "%s\n", e.what());
      return 2;
    }
  }
  if (words.size() == 2 && words[0] == "rank") return certkv::test::be_rank(words[1]);
  if (words.size() == 2 && words[0] == "sharing-rank")
    return certkv::test::be_sharing_rank(words[1]);
  if (words.size() == 2 && words[0] == "starter") return certkv::test::be_starter();
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
