// The contract over UCX: servers are processes of their own (this program again), so that they can
// be killed and stopped. Then what UCX alone has: networks, strangers, garbage.
#include "parallel/ucx_transport.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "parallel/ucx_context.h"
#include "tests/support/thrown_by.h"
#include "tests/support/transport_contract.h"

namespace certkv::test {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

constexpr int kKeyFd = 3, kAddressFd = 4;

class UcxServer : public ContractServer {
 public:
  UcxServer(const JobKey& key, const std::string& require) {
    int key_pipe[2], address_pipe[2];
    if (pipe(key_pipe) != 0 || pipe(address_pipe) != 0) throw std::runtime_error("pipe");
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      // Above the numbers that they are to have, so that neither is overwritten.
      const int k = fcntl(key_pipe[0], F_DUPFD, 20), a = fcntl(address_pipe[1], F_DUPFD, 20);
      if (dup2(k, kKeyFd) < 0 || dup2(a, kAddressFd) < 0) _exit(3);
      close_range(kAddressFd + 1, ~0U, 0);
      execl("/proc/self/exe", "ucx_server", "--serve", require.c_str(), nullptr);
      _exit(3);
    }
    close(key_pipe[0]);
    close(address_pipe[1]);
    const std::string hex = key.hex();
    if (write(key_pipe[1], hex.data(), hex.size()) != ssize_t(hex.size())) ADD_FAILURE();
    close(key_pipe[1]);
    std::array<char, 256> text{};
    pollfd p{address_pipe[0], POLLIN, 0};
    const int patience_ms = 20000 * kDeadlineFactor;
    const ssize_t n =
        poll(&p, 1, patience_ms) > 0 ? read(address_pipe[0], text.data(), text.size()) : -1;
    close(address_pipe[0]);
    EXPECT_GT(n, 0) << "the server did not start";
    if (n > 0) address_.assign(text.data(), size_t(n));
  }
  ~UcxServer() override { kill(); }
  std::string address() const override { return address_; }
  void kill() override {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
  }
  void pause() override { ::kill(pid_, SIGSTOP); }
  void resume() override { ::kill(pid_, SIGCONT); }
  bool running() {
    int status = 0;
    return waitpid(pid_, &status, WNOHANG) == 0;
  }

 private:
  pid_t pid_ = 0;
  std::string address_;
};

int serve(const std::string& require) {
  TransportOptions options = contract_options();
  options.listen = "127.0.0.1:0";
  options.require = require;
  const auto transport = make_ucx_transport(JobKey::from_fd(kKeyFd), options, contract_handler());
  const std::string address = transport->address();
  if (write(kAddressFd, address.data(), address.size()) < 0) return 3;
  close(kAddressFd);
  for (;;) ::pause();
}

struct UcxWorld : TransportKind::World {
  explicit UcxWorld(std::string network) : require(std::move(network)) {}
  std::unique_ptr<Transport> client(const TransportOptions& options, bool wrong_key) override {
    TransportOptions o = options;
    o.require = require;
    return make_ucx_transport(wrong_key ? JobKey::generate() : key, o, contract_handler());
  }
  std::unique_ptr<ContractServer> server() override {
    return std::make_unique<UcxServer>(key, require);
  }
  JobKey key = JobKey::generate();
  std::string require;
};

template <const char* Require>
std::unique_ptr<TransportKind::World> make_world() {
  return std::make_unique<UcxWorld>(Require);
}
constexpr char kTcp[] = "tcp", kAuto[] = "auto";

INSTANTIATE_TEST_SUITE_P(Ucx, TransportContract,
                         testing::Values(TransportKind{kTcp, make_world<kTcp>},
                                         TransportKind{kAuto, make_world<kAuto>}),
                         [](const auto& kind) { return std::string(kind.param.name); });

// ---- networks -----------------------------------------------------------------------------------

TEST(UcxNetworks, SegmentsOfSystemVAreNeverUsed) {
  EXPECT_EQ(ucx_transports("auto", nullptr), "^sysv");
  EXPECT_EQ(ucx_transports("auto", "all"), "^sysv");
  EXPECT_EQ(ucx_transports("auto", "^tcp"), "^tcp,sysv");
  EXPECT_EQ(ucx_transports("auto", "tcp,sm"), "tcp,posix,cma,xpmem");
  EXPECT_EQ(ucx_transports("auto", "sysv,tcp"), "tcp");
  EXPECT_THAT(thrown_by([] { ucx_transports("auto", "sysv"); }), HasSubstr("sysv is not used"));
}

TEST(UcxNetworks, ARequirementThatIsNotMetIsNamed) {
  TransportOptions options = contract_options();
  const auto make = [&] { make_ucx_transport(JobKey::generate(), options, contract_handler()); };
  options.require = "infiniband";
  EXPECT_THAT(thrown_by(make), AllOf(HasSubstr("InvalidArgument"), HasSubstr("'infiniband'"),
                                     HasSubstr("auto, tcp, shm, rdma")));
  options.require = "rdma";
  const std::string got = thrown_by(make);
  if (got.empty()) GTEST_SKIP() << "this machine has RDMA: the requirement is met";
  EXPECT_THAT(got, AllOf(HasSubstr("CommError"), HasSubstr("store.transport.require is 'rdma'")));
}

TEST(UcxNetworks, TheChosenOnesAreSaidInOneLine) {
  TransportOptions options = contract_options();
  options.require = "tcp";
  options.listen = "127.0.0.1:0";
  const auto t = make_ucx_transport(JobKey::generate(), options, contract_handler());
  EXPECT_THAT(t->description(), AllOf(HasSubstr("network (tcp): "), HasSubstr("tcp over "),
                                      HasSubstr("listening at 127.0.0.1:"), Not(HasSubstr("\n")),
                                      Not(HasSubstr("posix"))));
}

TEST(UcxNetworks, APortInUseIsNamed) {
  TransportOptions options = contract_options();
  options.require = "tcp";
  options.listen = "127.0.0.1:0";
  const auto first = make_ucx_transport(JobKey::generate(), options, contract_handler());
  options.listen = first->address();
  EXPECT_THAT(
      thrown_by([&] { make_ucx_transport(JobKey::generate(), options, contract_handler()); }),
      HasSubstr("InvalidArgument"));
}

// ---- strangers ----------------------------------------------------------------------------------

int dial(const std::string& address) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  a.sin_port = htons(uint16_t(std::stoi(address.substr(address.rfind(':') + 1))));
  if (connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0) return fd;
  close(fd);
  return -1;
}

// Garbage may end the process that listens; it may not make it answer, nor grow, nor harm those who
// call it: their calls end by name.
TEST(UcxStrangers, GarbageOnThePortHarmsNoCaller) {
  UcxWorld world("tcp");
  auto server = std::make_unique<UcxServer>(world.key, "tcp");
  const auto client = world.client(contract_options(), false);
  const auto deadline = [] { return Deadline::after(milliseconds(20000)); };
  PeerId peer = client->connect(server->address(), deadline());
  std::mt19937_64 random(1);
  int served = 0, ended = 0;
  for (int i = 0; i < 60; ++i) {
    const int fd = dial(server->address());
    if (fd >= 0) {
      std::vector<uint8_t> bytes(random() % 2000);
      for (auto& b : bytes) b = uint8_t(random());
      send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      close(fd);
    }
    std::vector<std::byte> body(100, std::byte(i));
    auto call = client->call(peer, kEcho, body, 100, deadline());
    const CallStatus status = call.wait();
    if (status == CallStatus::Ok) {
      ASSERT_TRUE(std::ranges::equal(call.reply(), body));
      ++served;
      continue;
    }
    ASSERT_EQ(status, CallStatus::PeerLost) << call_status_name(status);
    ++ended;
    server = std::make_unique<UcxServer>(world.key, "tcp");
    peer = client->connect(server->address(), deadline());
  }
  EXPECT_EQ(served + ended, 60);
  EXPECT_GT(served, 0);
}

TEST(UcxStrangers, IdleOnesHoldNobodyUp) {
  UcxWorld world("tcp");
  UcxServer server(world.key, "tcp");
  std::vector<int> idle;
  for (int i = 0; i < 50; ++i) idle.push_back(dial(server.address()));
  const auto client = world.client(contract_options(), false);
  const PeerId peer = client->connect(server.address(), Deadline::after(milliseconds(20000)));
  const std::vector<std::byte> body(10);
  auto call = client->call(peer, kEcho, body, 10, Deadline::after(milliseconds(20000)));
  EXPECT_EQ(call.wait(), CallStatus::Ok);
  for (const int fd : idle) close(fd);
}

// Windows that a rendezvous was under way in come back when its peer dies.
TEST(UcxStrangers, PeersThatDieInTheMiddleOfTransfersCostNoMemoryForGood) {
  UcxWorld world("tcp");
  TransportOptions options = contract_options();
  options.limits.window_bytes = size_t(16) << 20;  // eight replies of the largest size
  const auto client = world.client(options, false);
  const auto deadline = [] { return Deadline::after(milliseconds(20000)); };
  for (int round = 0; round < 8; ++round) {
    UcxServer server(world.key, "tcp");
    const PeerId peer = client->connect(server.address(), deadline());
    const std::array<uint64_t, 2> words{options.limits.reply_bytes, 1};
    std::vector<TransportCall> calls;
    for (int i = 0; i < 4; ++i) {
      calls.push_back(client->call(peer, kFill, std::as_bytes(std::span(words)),
                                   options.limits.reply_bytes, deadline()));
    }
    std::this_thread::sleep_for(milliseconds(2 * round));
    server.kill();
    for (auto& call : calls) {
      const CallStatus status = call.wait();
      EXPECT_TRUE(status == CallStatus::Ok || status == CallStatus::PeerLost)
          << call_status_name(status);
    }
  }
}

}  // namespace
}  // namespace certkv::test

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--serve") {
    try {
      return certkv::test::serve(argv[2]);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s\n", e.what());
      return 3;
    }
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
