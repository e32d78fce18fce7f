// The server as the holder's child: real processes, UCX over loopback. This program is also the
// store and the server that it starts.
#include "kvstore/server/server_process.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "kernels/base/asio.h"
#include "kernels/base/error.h"
#include "kvstore/remote_reader.h"
#include "kvstore/server_child.h"
#include "kvstore/store_process.h"
#include "parallel/ucx_transport.h"
#include "tests/kvstore/store_support.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thrown_by.h"

namespace certkv::test {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

// A port of loopback that nobody listens at.
int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof a;
  EXPECT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&a), length), 0);
  EXPECT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&a), &length), 0);
  close(fd);
  return ntohs(a.sin_port);
}

bool running(int64_t pid) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  const size_t end = text.rfind(')');
  return end != std::string::npos && end + 2 < text.size() && text[end + 2] != 'Z';
}

// A store with its server, and a client of another node.
class ServedStore : public testing::Test {
 protected:
  ServedStore() {
    key_file = folder.write("key", key.hex());
    chmod(key_file.c_str(), 0600);
    StoreProcessOptions o;
    o.arena_bytes = uint64_t(8) << 20;
    o.linger = milliseconds(300);
    o.listen = "127.0.0.1:" + std::to_string(free_port());
    o.require = "tcp";
    o.key_file = key_file;
    address = o.listen;
    store = spawn_store(o, milliseconds(20000));
    StoreClientOptions c;
    c.socket = store.socket;
    writer = StoreClient::attach(c, patience());
    ReserveRequest r;
    r.owner = private_owner();
    r.shape = small_shape();
    r.blocks = 64;
    span = writer->reserve(r);
    for (uint32_t b = 0; b < 64; ++b) {
      seal_known(span, 0, 0, b);
      ids.push_back(span.id(0, 0, b));
    }
    TransportOptions t;
    t.require = "tcp";
    t.heartbeat = milliseconds(100);
    t.silence = milliseconds(1000);
    transport = make_ucx_transport(key, t, [](const TransportRequest&, TransportReply&) {});
    peer = std::make_shared<RemotePeer>(transport, address);
    reader = std::make_unique<RemoteReader>(peer, small_shape(), RemoteReaderOptions{16, 4, 4});
  }
  ~ServedStore() override {
    writer->detach();
    if (store.pid > 1) kill(pid_t(store.pid), SIGTERM);
  }

  nlohmann::json server() { return nlohmann::json::parse(writer->status_json())["server"]; }

  // Reads everything. True where all came, false where some are lost; anything else is a failure.
  bool read_all(milliseconds within = milliseconds(3000)) {
    const size_t n = small_shape().elements();
    std::vector<uint16_t> k(ids.size() * n), v(k.size());
    std::vector<Destination> to;
    for (size_t i = 0; i < ids.size(); ++i) {
      to.push_back({BlockPart::Both, false, &k[i * n], &v[i * n]});
    }
    const Deadline limit = Deadline::after(within + milliseconds(10000));
    ReadTicket ticket = reader->read(ids, to, Deadline::after(within));
    bool all = true;
    for (const BlockResult& r : BlockReader::wait(ticket)) {
      const auto i = size_t(&r - BlockReader::wait(ticket).data());
      if (r.status == BlockStatus::Ok) {
        const auto expect_k = known_rows(small_shape(), 0, 0, ids[i].block, false);
        const auto expect_v = known_rows(small_shape(), 0, 0, ids[i].block, true);
        EXPECT_TRUE(std::equal(expect_k.begin(), expect_k.end(), r.k)) << "wrong bytes";
        EXPECT_TRUE(std::equal(expect_v.begin(), expect_v.end(), r.v)) << "wrong bytes";
      } else {
        EXPECT_EQ(r.status, BlockStatus::Lost) << block_status_name(r.status);
        all = false;
      }
    }
    EXPECT_FALSE(limit.passed()) << "a read went far beyond its deadline";
    return all;
  }

  const TempFolder folder;
  const JobKey key = JobKey::generate();
  std::string key_file, address;
  SpawnedStore store;
  std::shared_ptr<StoreClient> writer;
  OriginalsSpan span;
  std::vector<BlockId> ids;
  std::shared_ptr<Transport> transport;
  std::shared_ptr<RemotePeer> peer;
  std::unique_ptr<RemoteReader> reader;
};

TEST_F(ServedStore, IsReadOverTheNetworkAndSaysWhereItListens) {
  ASSERT_TRUE(eventually([&] { return read_all(); }));
  EXPECT_EQ(server()["state"], "running");
  ASSERT_TRUE(eventually([&] { return !writer->peers().empty(); }));
  EXPECT_EQ(nlohmann::json::parse(writer->peers())["address"], address);
}

TEST_F(ServedStore, AServerThatIsKilledWhileItIsReadComesBackAndNothingIsLostOrWrong) {
  ASSERT_TRUE(eventually([&] { return read_all(); }));
  int lost = 0;
  for (int round = 0; round < 3; ++round) {
    const int64_t pid = server()["pid"];
    ASSERT_GT(pid, 1);
    std::thread killer([&] {
      std::this_thread::sleep_for(milliseconds(20 * round));
      kill(pid_t(pid), SIGKILL);
    });
    while (running(pid)) lost += !read_all();
    killer.join();
    lost += !read_all();
    ASSERT_TRUE(eventually([&] { return read_all(); })) << "it did not come back";
    EXPECT_NE(server()["pid"], pid);
  }
  EXPECT_GE(lost, 1);
  EXPECT_EQ(server()["restarts"], 3);
  EXPECT_EQ(server()["last_end"], "signal 9");
  EXPECT_FALSE(writer->lost()) << "the holder went with it";
  EXPECT_EQ(read_copy(*writer->reader(), ids[7], small_shape()).result.status, BlockStatus::Ok);
}

TEST_F(ServedStore, AServerThatIsStoppedIsLostWithinTheDeadline) {
  ASSERT_TRUE(eventually([&] { return read_all(); }));
  const pid_t pid = server()["pid"];
  kill(pid, SIGSTOP);
  EXPECT_FALSE(read_all(milliseconds(500)));
  EXPECT_FALSE(writer->lost());
  kill(pid, SIGCONT);
  EXPECT_TRUE(eventually([&] { return read_all(); }));
}

// Two stores; the second holds the copies of the first, loses its server, and then is all there is.
TEST_F(ServedStore, CopiesOutliveTheServerThatTookThemInAndTheNodeTheyCameFrom) {
  StoreProcessOptions o;
  o.arena_bytes = uint64_t(8) << 20;
  o.linger = milliseconds(300);
  o.require = "tcp";
  o.key_file = key_file;
  o.listen = "127.0.0.1:" + std::to_string(free_port());
  const std::string first_address = "127.0.0.1:" + std::to_string(free_port());
  const SpawnedStore second = spawn_store(o, milliseconds(20000));
  o.peers = o.listen + "," + first_address;  // its own name among them is left out
  const std::string second_address = std::exchange(o.listen, first_address);
  o.replicas = 2;
  const SpawnedStore first = spawn_store(o, milliseconds(20000));
  StoreClientOptions c;
  c.socket = second.socket;
  const auto watcher = StoreClient::attach(c, patience());
  c.socket = first.socket;
  const auto rank = StoreClient::attach(c, patience());
  ReserveRequest r = span.request();
  r.owner = private_owner();
  OriginalsSpan mine = rank->reserve(r);
  for (uint32_t b = 0; b < 60; ++b) seal_known(mine, 0, 0, b);
  const auto held = [&] {
    const std::string text = watcher->peers();
    return text.empty() ? 0 : int(nlohmann::json::parse(text)["held_for_others"]["blocks"]);
  };
  ASSERT_TRUE(eventually([&] { return held() == 60; }));
  const auto copied = [&] {
    return int(nlohmann::json::parse(rank->peers())["replication"]["copied_blocks"]);
  };
  ASSERT_TRUE(eventually([&] { return copied() == 60; }));

  const auto state = [&] { return nlohmann::json::parse(watcher->status_json())["server"]; };
  kill(pid_t(state()["pid"]), SIGKILL);
  ASSERT_TRUE(eventually([&] { return state()["restarts"] == 1 && state()["pid"] != 0; }));
  for (uint32_t b = 60; b < 64; ++b) seal_known(mine, 0, 0, b);
  ASSERT_TRUE(eventually([&] { return copied() == 64 && held() == 64; }));

  kill(pid_t(first.pid), SIGKILL);
  RemoteReader other(std::make_shared<RemotePeer>(transport, second_address), small_shape());
  for (const uint32_t b : {0u, 31u, 59u, 60u, 63u}) {
    const Copied got = read_copy(other, mine.id(0, 0, b), small_shape());
    ASSERT_EQ(got.result.status, BlockStatus::Ok) << b;
    EXPECT_EQ(got.k, known_rows(small_shape(), 0, 0, b, false));
    EXPECT_EQ(got.v, known_rows(small_shape(), 0, 0, b, true));
  }
  kill(pid_t(second.pid), SIGTERM);
}

TEST_F(ServedStore, AnotherKeyReadsNothing) {
  ASSERT_TRUE(eventually([&] { return read_all(); }));
  TransportOptions t;
  t.require = "tcp";
  const std::shared_ptr<Transport> stranger =
      make_ucx_transport(JobKey::generate(), t, [](const TransportRequest&, TransportReply&) {});
  EXPECT_THAT(thrown_by([&] { stranger->connect(address, patience()); }), HasSubstr("CommError"));
  RemoteReader r(std::make_shared<RemotePeer>(stranger, address), small_shape());
  EXPECT_EQ(read_copy(r, ids[0], small_shape()).result.status, BlockStatus::Lost);
  EXPECT_TRUE(read_all());
}

TEST_F(ServedStore, TheServerEndsWithItsHolder) {
  ASSERT_TRUE(eventually([&] { return server()["pid"] != 0; }));
  const int64_t pid = server()["pid"];
  kill(pid_t(store.pid), SIGKILL);
  EXPECT_TRUE(eventually([&] { return !running(pid); }));
  store.pid = 0;
}

TEST_F(ServedStore, TheServersSessionKeepsNoStoreAlive) {
  ASSERT_TRUE(eventually([&] { return read_all(); }));
  const int64_t pid = server()["pid"];
  writer->detach();
  EXPECT_TRUE(eventually([&] { return !running(store.pid) && !running(pid); }));
}

// ---- the child's life ---------------------------------------------------------------------------

TEST(ServerChild, OneThatFailsAtItsStartIsGivenUpAfterGrowingPauses) {
  boost::asio::io_context io;
  ServerChildOptions o;
  o.command = {"/bin/false"};
  o.first_pause = milliseconds(4);
  o.longest_pause = milliseconds(16);
  o.starts = 5;
  int ends = 0;
  const auto began = std::chrono::steady_clock::now();
  ServerChild child(io, o, [&] { ++ends; });
  child.start();
  io.run();  // ends when nothing is left to be done
  EXPECT_EQ(ends, 5);
  EXPECT_GE(std::chrono::steady_clock::now() - began, milliseconds(4 + 8 + 16 + 16));
  EXPECT_THAT(child.describe(), AllOf(HasSubstr("\"given up\""), HasSubstr("\"restarts\":4"),
                                      HasSubstr("exit code 1")));
}

TEST(ServerChild, GetsTheKeyThroughADescriptorAndNothingElse) {
  const TempFolder folder;
  const std::string out = folder / "seen";
  boost::asio::io_context io;
  ServerChildOptions o;
  o.key = JobKey::generate();
  o.starts = 1;
  // The key, its own command line and environment, its descriptors.
  o.command = {"/bin/sh", "-c",
               "cat <&3 > " + out + "; tr '\\0' ' ' < /proc/self/cmdline >> " + out +
                   "; ls /proc/$$/fd > " + out + ".fds"};
  ServerChild child(io, o, {});
  child.start();
  io.run();
  const std::string seen = TempFolder::read(out);
  EXPECT_EQ(seen.substr(0, 64), o.key->hex());
  EXPECT_EQ(seen.find(o.key->hex(), 64), std::string::npos);
  std::ifstream fds(out + ".fds");
  std::vector<int> numbers;
  for (int fd; fds >> fd;) {
    if (fd < 10) numbers.push_back(fd);  // a shell keeps its own above
  }
  EXPECT_THAT(numbers, testing::ElementsAre(0, 1, 2, 3));
}

TEST(StoreServerArguments, GoThereAndBack) {
  StoreServerOptions o;
  o.holder = "@x";
  o.listen = "10.0.0.1:7000";
  o.require = "tcp";
  o.key_file = "/tmp/key";
  o.peers = {"a:1", "b:2"};
  o.silence = milliseconds(777);
  const StoreServerOptions back = parse_store_server_arguments(store_server_arguments(o));
  EXPECT_EQ(back.holder, o.holder);
  EXPECT_EQ(back.listen, o.listen);
  EXPECT_EQ(back.require, o.require);
  EXPECT_EQ(back.key_file, o.key_file);
  EXPECT_EQ(back.peers, o.peers);
  EXPECT_EQ(back.silence, o.silence);
  for (const std::vector<std::string>& bad :
       {std::vector<std::string>{"--holder", "@x"},
        {"--listen", "a:1"},
        {"--wat", "1"},
        {"--holder"},
        {"--holder", "@x", "--listen", "a:1", "--silence-ms", "x"}}) {
    EXPECT_THAT(thrown_by([&] { parse_store_server_arguments(bad); }),
                HasSubstr("InvalidArgument"));
  }
}

}  // namespace
}  // namespace certkv::test

int main(int argc, char** argv) {
  const std::vector<std::string> rest(argv + std::min(argc, 2), argv + argc);
  const std::string role = argc > 1 ? argv[1] : "";
  try {
    if (role == "store") return certkv::run_store(certkv::parse_store_arguments(rest));
    if (role == "store-server") {
      return certkv::run_store_server(certkv::parse_store_server_arguments(rest));
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
