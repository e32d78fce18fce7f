// The holder's control socket against clients that do not keep to the protocol.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/base/error.h"
#include "kvstore/unique_fd.h"
#include "tests/kvstore/raw_client.h"
#include "tests/kvstore/store_support.h"

namespace certkv::test {
namespace {

using std::chrono::milliseconds;

HolderOptions quick() {
  HolderOptions o;
  o.stranger = milliseconds(300);
  return o;
}

// After whatever was done to it, the holder still serves.
void expect_alive(const ThreadHolder& holder) {
  auto client = holder.attach();
  ReserveRequest r;
  r.owner = private_owner();
  r.shape = small_shape();
  OriginalsSpan span = client->reserve(r);
  seal_known(span, 0, 0, 0);
  EXPECT_EQ(read_copy(*client->reader(), span.id(0, 0, 0), r.shape).result.status, BlockStatus::Ok);
}

TEST(ControlSocket, RandomBytesEndTheirConnectionAndNothingElse) {
  ThreadHolder holder(uint64_t(1) << 20, quick());
  auto bystander = holder.attach();
  std::mt19937_64 random(5);
  for (int i = 0; i < 300; ++i) {
    RawClient c(holder.socket());
    ASSERT_TRUE(c.connected());
    std::vector<std::byte> bytes(64 + random() % 400);
    for (auto& b : bytes) b = std::byte(random());
    if (i % 3 == 1) std::memcpy(bytes.data(), &kFrameMagic, 4);  // gets past the first check
    c.send_bytes(bytes);
    ASSERT_TRUE(c.closed_by_peer()) << i;
  }
  EXPECT_FALSE(bystander->lost());
  expect_alive(holder);
}

// Correct frames with one thing wrong, on an attached connection.
TEST(ControlSocket, FramesThatBreakTheProtocolEndTheirConnection) {
  ThreadHolder holder(uint64_t(1) << 20, quick());
  const auto frame = [](ControlOp op, uint64_t sequence, uint64_t session,
                        std::span<const std::byte> payload = {}) {
    return make_frame(uint16_t(op), ControlStatus::Ok, sequence, session, payload);
  };
  const std::vector<std::byte> junk(48, std::byte(0xa5));
  const auto refused = [&](auto make) {
    RawClient c(holder.socket());
    const uint64_t session = c.attach();
    ASSERT_NE(session, 0u);
    c.send_bytes(make(session));
    EXPECT_TRUE(c.closed_by_peer());
  };
  const auto cap = ControlOp::Capacity;
  refused([&](uint64_t s) { return frame(cap, 1, s); });      // replayed
  refused([&](uint64_t s) { return frame(cap, 3, s); });      // one was skipped
  refused([&](uint64_t s) { return frame(cap, 2, s + 1); });  // another's session
  refused([&](uint64_t) { return frame(cap, 2, 0); });
  refused([&](uint64_t s) { return frame(cap, 2, s, junk); });
  refused([&](uint64_t s) { return frame(ControlOp::Attach, 2, s, std::span(junk).first(8)); });
  refused([&](uint64_t s) { return frame(ControlOp(99), 2, s); });
  refused([&](uint64_t s) { return frame(ControlOp(0), 2, s); });
  refused([&](uint64_t s) { return frame(ControlOp(uint16_t(cap) | kReplyBit), 2, s); });
  refused([&](uint64_t s) { return frame(ControlOp::Release, 2, s, std::span(junk).first(8)); });
  refused([&](uint64_t s) { return frame(ControlOp::Allocate, 2, s, std::span(junk).first(47)); });
  refused([&](uint64_t s) {
    auto f = frame(cap, 2, s);
    f[32] ^= std::byte(1);  // checksum
    return f;
  });
  refused([&](uint64_t s) {
    FrameHeader h;
    h.op = uint16_t(cap);
    h.sequence = 2;
    h.session = s;
    h.payload_bytes = 0xffffffff;
    std::vector<std::byte> f(sizeof h);
    std::memcpy(f.data(), &h, sizeof h);
    return f;
  });
  RawClient unattached(holder.socket());
  unattached.send_bytes(frame(cap, 1, 0));
  EXPECT_TRUE(unattached.closed_by_peer());
  expect_alive(holder);
}

TEST(ControlSocket, NonsensicalButWellFormedRequestsAreAnsweredWithAReason) {
  ThreadHolder holder(uint64_t(1) << 20, quick());
  RawClient c(holder.socket());
  const uint64_t session = c.attach();
  ASSERT_NE(session, 0u);
  std::mt19937_64 random(6);
  FrameHeader h;
  std::vector<std::byte> payload;
  uint64_t sequence = 1;
  for (int i = 0; i < 500; ++i) {
    AllocateRequest r;
    auto* words = reinterpret_cast<uint32_t*>(&r);
    for (size_t w = 0; w < sizeof r / 4; ++w) {
      words[w] = random() % 2 == 0 ? uint32_t(random()) : uint32_t(random() % 40);
    }
    c.send_bytes(make_frame(uint16_t(ControlOp::Allocate), ControlStatus::Ok, ++sequence, session,
                            payload_of(r)));
    ASSERT_TRUE(c.receive_frame(h, payload)) << i;
    ASSERT_EQ(h.sequence, sequence);
    const ReleaseRequest release{uint32_t(random()), 0};
    c.send_bytes(make_frame(uint16_t(ControlOp::Release), ControlStatus::Ok, ++sequence, session,
                            payload_of(release)));
    ASSERT_TRUE(c.receive_frame(h, payload)) << i;
    ASSERT_EQ(h.status, uint32_t(ControlStatus::BadRequest));
  }
  expect_alive(holder);
}

TEST(ControlSocket, ASessionCannotReleaseAnothersSpace) {
  ThreadHolder holder(uint64_t(1) << 20, quick());
  auto owner = holder.attach();
  ReserveRequest r;
  r.owner = private_owner();
  r.shape = small_shape();
  OriginalsSpan span = owner->reserve(r);
  seal_known(span, 0, 0, 0);
  RawClient thief(holder.socket());
  const uint64_t session = thief.attach();
  const ReleaseRequest release{span.id(0, 0, 0).version, 0};
  thief.send_bytes(
      make_frame(uint16_t(ControlOp::Release), ControlStatus::Ok, 2, session, payload_of(release)));
  FrameHeader h;
  std::vector<std::byte> payload;
  ASSERT_TRUE(thief.receive_frame(h, payload));
  EXPECT_EQ(h.status, uint32_t(ControlStatus::BadRequest));
  EXPECT_EQ(read_copy(*owner->reader(), span.id(0, 0, 0), r.shape).result.status, BlockStatus::Ok);
}

TEST(ControlSocket, SilentAndSlowStrangersAreDropped) {
  ThreadHolder holder(uint64_t(1) << 20, quick());
  RawClient silent(holder.socket());
  RawClient slow(holder.socket());
  const auto attach = make_frame(uint16_t(ControlOp::Attach), ControlStatus::Ok, 1, 0,
                                 payload_of(AttachRequest{0, 0}));
  slow.send_bytes(std::span(attach).first(20));
  EXPECT_TRUE(silent.closed_by_peer());
  EXPECT_TRUE(slow.closed_by_peer());
  // One that has attached may be silent for as long as it likes, but must end a frame it begins.
  RawClient attached(holder.socket());
  const uint64_t session = attached.attach();
  ASSERT_NE(session, 0u);
  std::this_thread::sleep_for(milliseconds(600));
  const auto ask = make_frame(uint16_t(ControlOp::Capacity), ControlStatus::Ok, 2, session, {});
  attached.send_bytes(ask);
  FrameHeader h;
  std::vector<std::byte> payload;
  ASSERT_TRUE(attached.receive_frame(h, payload));
  attached.send_bytes(std::span(ask).first(5));
  EXPECT_TRUE(attached.closed_by_peer());
  expect_alive(holder);
}

TEST(ControlSocket, ConnectionsAreLimited) {
  HolderOptions options = quick();
  options.max_connections = 4;
  options.stranger = milliseconds(60000);
  ThreadHolder holder(uint64_t(1) << 20, options);
  {
    std::vector<std::unique_ptr<RawClient>> idle;
    for (int i = 0; i < 4; ++i) idle.push_back(std::make_unique<RawClient>(holder.socket()));
    for (auto& c : idle) ASSERT_NE(c->attach(), 0u);
    RawClient fifth(holder.socket());
    EXPECT_TRUE(fifth.closed_by_peer());
  }
  ASSERT_TRUE(eventually([&] {
    RawClient c(holder.socket());
    return c.attach() != 0;
  }));
}

TEST(ControlSocket, AnotherUserIsRefused) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become another user in a child process";
  ThreadHolder holder(uint64_t(1) << 20);
  const std::string name = holder.socket();
  const pid_t pid = fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    if (setgid(65534) != 0 || setuid(65534) != 0) _exit(3);
    RawClient c(name);
    if (!c.connected()) _exit(4);  // an abstract name can be connected to by anybody
    _exit(c.attach() == 0 && c.closed_by_peer() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  expect_alive(holder);
}

TEST(ControlSocket, AStoreOfAnotherUserIsRefusedByTheClient) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become another user in a child process";
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const std::string name = random_socket_name();
  const pid_t pid = fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {  // an impostor that has taken the name first
    if (setgid(65534) != 0 || setuid(65534) != 0) _exit(3);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path + 1, name.data() + 1, name.size() - 1);
    const int s = socket(AF_UNIX, SOCK_STREAM, 0);
    const auto length = socklen_t(offsetof(sockaddr_un, sun_path) + name.size());
    if (bind(s, reinterpret_cast<sockaddr*>(&address), length) != 0 || listen(s, 1) != 0) _exit(4);
    char go = 1;
    if (write(ends[1], &go, 1) != 1) _exit(5);
    alarm(20);
    pause();
  }
  char go = 0;
  ASSERT_EQ(read(ends[0], &go, 1), 1);
  StoreClientOptions o;
  o.socket = name;
  try {
    StoreClient::attach(o, patience());
    ADD_FAILURE() << "attached to another user's socket";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::CommError) << e.what();
  }
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  close(ends[0]);
  close(ends[1]);
}

TEST(ControlSocket, APathIsPrivateAndALiveStoreIsNotReplaced) {
  HolderOptions options = quick();
  std::string folder = "/tmp/certkv-control-test-XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  options.socket = folder + "/store";
  {
    ThreadHolder holder(uint64_t(1) << 20, options);
    struct stat st {};
    ASSERT_EQ(stat(options.socket.c_str(), &st), 0);
    EXPECT_EQ(st.st_mode & 0777, 0600u);
    EXPECT_THROW(ThreadHolder(uint64_t(1) << 20, options), Error);
    expect_alive(holder);
  }
  struct stat st {};
  EXPECT_NE(stat(options.socket.c_str(), &st), 0) << "the socket file must be gone";
  {  // what a killed store leaves behind is taken over
    const UniqueFd dead(socket(AF_UNIX, SOCK_STREAM, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, options.socket.c_str(), options.socket.size());
    ASSERT_EQ(bind(dead.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  {
    ThreadHolder holder(uint64_t(1) << 20, options);
    expect_alive(holder);
  }
  rmdir(folder.c_str());
}

TEST(ControlSocket, TheHolderEndsWhenNobodyComesAndAfterTheLastHasGone) {
  HolderOptions options;
  options.attach_within = milliseconds(100);
  options.linger = milliseconds(150);
  ThreadHolder lonely(uint64_t(1) << 20, options);
  EXPECT_NE(lonely.join().find("no rank attached"), std::string::npos);
  options.attach_within = milliseconds(20000);
  ThreadHolder left(uint64_t(1) << 20, options);
  auto first = left.attach(0);
  auto second = left.attach(1);
  first.reset();
  std::this_thread::sleep_for(milliseconds(400));
  EXPECT_FALSE(second->lost()) << "one rank is still there";
  second.reset();
  EXPECT_NE(left.join().find("last rank"), std::string::npos);
}

TEST(ControlSocket, StatusCountsWhatHappened) {
  ThreadHolder holder(uint64_t(1) << 20, quick());
  auto client = holder.attach(5);
  RawClient bad(holder.socket());
  bad.send_bytes(std::vector<std::byte>(64, std::byte(1)));
  ASSERT_TRUE(bad.closed_by_peer());
  client->stamp_progress();
  ASSERT_TRUE(eventually([&] {
    return client->status_json().find("\"progress\":1}") != std::string::npos;
  })) << client->status_json();
  const std::string status = client->status_json();
  EXPECT_NE(status.find("\"frames_malformed\":1"), std::string::npos) << status;
  EXPECT_NE(status.find("\"rank\":5"), std::string::npos) << status;
}

}  // namespace
}  // namespace certkv::test
