// certkv bench store: reading and sealing originals, each beside what bounds it: memcpy for this
// node's arena, ucx_perftest for another node's store. Every byte that is read is compared.
#include <arpa/inet.h>
#include <fmt/core.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <thread>

#include "kvstore/client.h"
#include "kvstore/remote_reader.h"
#include "kvstore/store_process.h"
#include "kvstore/unique_fd.h"
#include "launcher/bench.h"
#include "parallel/ucx_transport.h"
#include "runtime/options_io.h"
#include "runtime/output_file.h"

namespace certkv {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr BlockShape kShape{DType::BF16, 16, 128};  // 4 KiB of K and as much of V
constexpr BlockShape kSmallShape{DType::BF16, 4, 16};
constexpr milliseconds kPatience{30000};
constexpr uint32_t kRunBlocks = 1000;  // of a reservation of small blocks

struct Keys {
  int64_t blocks = 8192;
  int64_t seal_blocks = 1000000;
  int64_t message_bytes = int64_t(1) << 20;
  int64_t repeat = 15;
  int64_t port = 0;
  std::string json;
};

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

int free_port() {
  const UniqueFd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof a;
  CERTKV_EXPECT(bind(fd.get(), reinterpret_cast<sockaddr*>(&a), length) == 0 &&
                    getsockname(fd.get(), reinterpret_cast<sockaddr*>(&a), &length) == 0,
                CommError, "no port of 127.0.0.1 is to be had");
  return ntohs(a.sin_port);
}

// What block i holds, and nothing else does: to be compared with what is read.
void fill(uint64_t i, bool values, std::span<uint16_t> rows) {
  uint64_t x = (i * 2 + uint64_t(values)) * 0x9e3779b97f4a7c15 + 1;
  for (uint16_t& r : rows) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    r = uint16_t(x >> 48);
  }
}

bool holds(uint64_t i, bool values, const uint16_t* rows, size_t count) {
  std::vector<uint16_t> expected(count);
  fill(i, values, expected);
  return std::memcmp(rows, expected.data(), count * sizeof *rows) == 0;
}

// A file of this user's alone, for as long as it is needed.
class KeyFile {
 public:
  explicit KeyFile(const JobKey& key) {
    std::string name = "/tmp/certkv-bench-key-XXXXXX";
    const UniqueFd fd(mkstemp(name.data()));
    const std::string hex = key.hex();
    CERTKV_EXPECT(fd.valid() && write(fd.get(), hex.data(), hex.size()) == ssize_t(hex.size()),
                  IoError, "no file can be written in /tmp");
    path = name;
  }
  ~KeyFile() { unlink(path.c_str()); }
  std::string path;
};

struct Blocks {
  std::vector<BlockId> ids;
  std::vector<uint16_t> k, v;
  std::vector<Destination> both, keys;

  explicit Blocks(const OriginalsSpan& span) {
    const uint32_t n = span.request().blocks;
    const size_t elements = kShape.elements();
    k.resize(n * elements);
    v.resize(n * elements);
    for (uint32_t b = 0; b < n; ++b) {
      ids.push_back(span.id(0, 0, b));
      uint16_t* const kb = &k[b * elements];
      both.push_back({BlockPart::Both, false, kb, &v[b * elements]});
      keys.push_back({BlockPart::K, false, kb, nullptr});
    }
  }
  void clear() {
    std::fill(k.begin(), k.end(), uint16_t(0));
    std::fill(v.begin(), v.end(), uint16_t(0));
  }
  // Every byte; throws Corrupt.
  void check(bool values) const {
    const size_t elements = kShape.elements();
    for (size_t b = 0; b < ids.size(); ++b) {
      CERTKV_EXPECT(holds(b, false, &k[b * elements], elements) &&
                        (!values || holds(b, true, &v[b * elements], elements)),
                    Corrupt, "block {} was delivered with other bytes than were sealed", b);
    }
  }
};

void read_all(BlockReader& reader, const Blocks& blocks, std::span<const Destination> to) {
  ReadTicket ticket = reader.read(blocks.ids, to, Deadline::after(kPatience));
  const ReadSummary s = summarize(BlockReader::wait(ticket));
  CERTKV_EXPECT(s.failed == 0, OriginalsLost, "{} of {} blocks were not delivered", s.failed,
                blocks.ids.size());
}

// ---- the three measurements ---------------------------------------------------------------------

Json bench_local(StoreClient& client, const OriginalsSpan& span, Blocks& blocks, int64_t repeat) {
  const auto reader = client.reader();
  const size_t bytes = blocks.ids.size() * 2 * kShape.payload_bytes();
  std::vector<std::byte> copy(blocks.ids.size() * kShape.slot_bytes());
  std::vector<double> read, plain;
  // The same memory in both directions, one after the other, so that both see the same machine.
  for (int64_t i = 0; i <= repeat; ++i) {
    blocks.clear();
    auto begin = Clock::now();
    read_all(*reader, blocks, blocks.both);
    if (i > 0) read.push_back(seconds_since(begin));
    blocks.check(true);
    std::memset(copy.data(), 0, copy.size());
    begin = Clock::now();
    std::memcpy(copy.data(), span.run(0, 0), copy.size());
    if (i > 0) plain.push_back(seconds_since(begin) * double(bytes) / double(copy.size()));
  }
  const double rate = double(bytes) / median(read) / 1e9,
               most = double(bytes) / median(plain) / 1e9;
  fmt::print("local     {:7.2f} GB/s  memcpy {:7.2f} GB/s  ratio {:.3f}\n", rate, most,
             rate / most);
  return {{"bytes", bytes}, {"gb_per_s", rate}, {"memcpy_gb_per_s", most}, {"ratio", rate / most}};
}

// MB (2^20) a second that ucx_perftest reaches between two processes; 0 where it is not installed.
double perftest(int64_t message_bytes) {
  if (std::system("command -v ucx_perftest > /dev/null 2>&1") != 0) return 0;
  const int port = free_port();
  const int64_t count = std::clamp<int64_t>((int64_t(1) << 29) / message_bytes, 50, 100000);
  const std::string command = fmt::format(
      "export UCX_TLS=tcp; ucx_perftest -p {0} > /dev/null 2>&1 & server=$!; sleep 0.5; "
      "timeout 60 ucx_perftest 127.0.0.1 -p {0} -t ucp_am_bw -s {1} -n {2} -w 20 -f 2>&1; "
      "kill $server 2> /dev/null; wait",
      port, message_bytes, count);
  FILE* out = popen(command.c_str(), "r");
  CERTKV_EXPECT(out != nullptr, CommError, "ucx_perftest could not be started");
  std::string text;
  char chunk[4096];
  while (const size_t n = fread(chunk, 1, sizeof chunk, out)) text.append(chunk, n);
  pclose(out);
  // "Final: iterations, latency (median, average, overall), bandwidth (average, overall), .."
  const size_t at = text.find("Final:");
  double x[6] = {};
  if (at != text.npos) {
    std::istringstream line(text.substr(at + 6));
    for (double& value : x) line >> value;
  } else {
    // With -f the last line holds the figures alone.
    std::istringstream lines(text);
    std::string line, last;
    while (std::getline(lines, line)) {
      if (!line.empty()) last = line;
    }
    std::istringstream values(last);
    for (double& value : x) values >> value;
  }
  CERTKV_EXPECT(x[5] > 0, CommError, "ucx_perftest gave no figure: {}", text.substr(0, 500));
  return x[5];
}

Json bench_remote(const std::string& address, const JobKey& key, Blocks& blocks, const Keys& o) {
  TransportOptions options;
  options.require = "tcp";
  const std::shared_ptr<Transport> transport =
      make_ucx_transport(key, options, [](const TransportRequest&, TransportReply&) {});
  const auto peer = std::make_shared<RemotePeer>(transport, address);
  const Deadline up = Deadline::after(kPatience);
  while (!peer->connection(up)) {
    CERTKV_EXPECT(!up.passed(), CommError, "the server at {} does not come up: {}", address,
                  peer->last_error());
    std::this_thread::sleep_for(milliseconds(10));
  }
  Json report;
  report["message_bytes"] = o.message_bytes;
  const double before = perftest(o.message_bytes);
  struct Kind {
    const char* name;
    bool values;
    double gb_per_s = 0;
  } kinds[] = {{"blocks_8k", true}, {"blocks_4k", false}};
  for (Kind& kind : kinds) {
    const size_t block = (kind.values ? 2 : 1) * kShape.payload_bytes();
    RemoteReaderOptions reading;
    reading.blocks = std::clamp<size_t>(size_t(o.message_bytes) / block, 1, 1024);
    RemoteReader reader(peer, kShape, reading);
    std::vector<double> times;
    for (int64_t i = 0; i <= o.repeat; ++i) {
      blocks.clear();
      const auto begin = Clock::now();
      read_all(reader, blocks, kind.values ? blocks.both : blocks.keys);
      if (i > 0) times.push_back(seconds_since(begin));
      blocks.check(kind.values);
    }
    kind.gb_per_s = double(blocks.ids.size() * block) / median(times) / 1e9;
    report[kind.name] = {{"blocks_per_request", reading.blocks}, {"gb_per_s", kind.gb_per_s}};
  }
  const double after = perftest(o.message_bytes);
  const double mib = (before + after) / 2;
  if (mib == 0) {
    fmt::print(
        "remote    {:7.3f} GB/s of 8 KB blocks, {:.3f} of 4 KB; ucx_perftest is not installed "
        "(package ucx-utils): no ratio\n",
        kinds[0].gb_per_s, kinds[1].gb_per_s);
    report["ucx_perftest_gb_per_s"] = nullptr;
    return report;
  }
  const double most = mib * double(1 << 20) / 1e9;
  report["ucx_perftest_gb_per_s"] = most;
  report["ucx_perftest_before_and_after_mib_per_s"] = {before, after};
  for (const Kind& kind : kinds) {
    report[kind.name]["ratio"] = kind.gb_per_s / most;
    fmt::print(
        "remote    {:7.3f} GB/s  ucx_perftest {:7.3f} GB/s  ratio {:.3f}  ({}, {} bytes a "
        "message)\n",
        kind.gb_per_s, most, kind.gb_per_s / most, kind.name, o.message_bytes);
  }
  return report;
}

Json bench_seal(StoreClient& client, int64_t blocks) {
  const size_t elements = kSmallShape.elements();
  std::vector<uint16_t> k(elements * kRunBlocks), v(k.size());
  std::vector<OriginalsSpan> spans;
  double seconds = 0;
  for (int64_t done = 0; done < blocks; done += kRunBlocks) {
    const auto n = uint32_t(std::min<int64_t>(kRunBlocks, blocks - done));
    for (uint32_t b = 0; b < n; ++b) {
      fill(uint64_t(done) + b, false, {&k[b * elements], elements});
      fill(uint64_t(done) + b, true, {&v[b * elements], elements});
    }
    ReserveRequest r;
    r.owner = private_owner();
    r.shape = kSmallShape;
    r.blocks = n;
    const auto begin = Clock::now();
    OriginalsSpan span = client.reserve(r);
    for (uint32_t b = 0; b < n; ++b) {
      span.seal_block(0, 0, b, &k[b * elements], &v[b * elements]);
    }
    seconds += seconds_since(begin);
    spans.push_back(std::move(span));
  }
  const auto reader = client.reader();
  std::vector<BlockId> ids;
  std::vector<Destination> to;
  for (size_t s = 0; s < spans.size(); ++s) {
    ids.clear();
    to.clear();
    const uint32_t n = spans[s].request().blocks;
    for (uint32_t b = 0; b < n; ++b) {
      ids.push_back(spans[s].id(0, 0, b));
      to.push_back({BlockPart::Both, false, &k[b * elements], &v[b * elements]});
    }
    ReadTicket ticket = reader->read(ids, to, Deadline::after(kPatience));
    const ReadSummary summary = summarize(BlockReader::wait(ticket));
    CERTKV_EXPECT(summary.failed == 0, OriginalsLost, "sealed blocks were not delivered");
    for (uint32_t b = 0; b < n; ++b) {
      const uint64_t i = s * kRunBlocks + b;
      CERTKV_EXPECT(
          holds(i, false, &k[b * elements], elements) && holds(i, true, &v[b * elements], elements),
          Corrupt, "block {} was delivered with other bytes than were sealed", i);
    }
  }
  const double rate = double(blocks) / seconds;
  fmt::print("seal      {:.0f} blocks/s on one core ({} blocks of {} bytes)\n", rate, blocks,
             2 * kSmallShape.payload_bytes());
  return {{"blocks", blocks}, {"seconds", seconds}, {"blocks_per_s", rate}};
}

uint64_t seal_bytes(int64_t blocks) {
  const uint64_t spans = uint64_t((blocks + kRunBlocks - 1) / kRunBlocks);
  return spans * (uint64_t(kRunBlocks) * kSmallShape.slot_bytes() + kArenaGranule);
}

}  // namespace

int bench_store_command(const std::vector<std::string>& values) {
  Keys o;
  OptionTable table;
  table.add("blocks", &o.blocks,
            {.meaning = "blocks of 4 KiB of keys and 4 KiB of values that are read at once",
             .min = 1,
             .max = 1e6});
  table.add("seal_blocks", &o.seal_blocks,
            {.meaning = "small blocks that are reserved and sealed", .min = 1, .max = 1e7});
  table.add("message_bytes", &o.message_bytes,
            {.meaning = "payload of one answer of the server, and of ucx_perftest's messages",
             .unit = "bytes",
             .min = 4096,
             .max = 8388608});
  table.add("repeat", &o.repeat,
            {.meaning = "times that a batch is read; the median counts", .min = 1, .max = 1e6});
  table.add("port", &o.port,
            {.meaning = "of 127.0.0.1, for the server; 0: any", .min = 0, .max = 65535});
  table.add("json", &o.json, {.meaning = "file to write the figures to"});
  if (table.read_arguments(values).help) {
    fmt::print("usage: certkv bench store [--json FILE]\n\n{}", table.help());
    return kExitDone;
  }
  const JobKey key = JobKey::generate();
  const KeyFile key_file(key);
  ReserveRequest request;
  request.owner = private_owner();
  request.shape = kShape;
  request.blocks = uint32_t(o.blocks);
  StoreProcessOptions store;
  store.arena_bytes = reservation_bytes(request) + seal_bytes(o.seal_blocks) + (uint64_t(16) << 20);
  store.linger = milliseconds(0);
  store.listen = fmt::format("127.0.0.1:{}", o.port > 0 ? int(o.port) : free_port());
  store.require = "tcp";
  store.key_file = key_file.path;
  const SpawnedStore spawned = spawn_store(store, kPatience);
  StoreClientOptions session;
  session.socket = spawned.socket;
  const auto client = StoreClient::attach(session, Deadline::after(kPatience));
  OriginalsSpan span = client->reserve(request);
  std::vector<uint16_t> k(kShape.elements()), v(k.size());
  for (uint32_t b = 0; b < request.blocks; ++b) {
    fill(b, false, k);
    fill(b, true, v);
    span.seal_block(0, 0, b, k.data(), v.data());
  }
  Blocks blocks(span);
  const Machine machine = inspect_machine();
  fmt::print("{}, {} cores; {} blocks of 8 KiB, every byte compared\n", machine.cpu,
             machine.cores_usable, o.blocks);
  Json report;
  report["machine"] = machine_json(machine, 1);
  report["local"] = bench_local(*client, span, blocks, o.repeat);
  report["remote"] = bench_remote(store.listen, key, blocks, o);
  report["seal"] = bench_seal(*client, o.seal_blocks);
  report["consistent"] = true;  // a byte that differs is an error before this
  if (!o.json.empty()) {
    AtomicFile file(o.json);
    file.write(report.dump(2) + "\n");
    file.commit();
  }
  return kExitDone;
}

}  // namespace certkv
