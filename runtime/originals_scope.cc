#include "runtime/originals_scope.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <vector>

#include "kernels/attend.h"
#include "kernels/base/error.h"
#include "kernels/blas.h"
#include "parallel/communicator.h"
#include "runtime/manifest.h"

namespace certkv {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kChunk = uint64_t(64) << 20;  // of a file, hashed by one rank
constexpr size_t kRead = size_t(1) << 20;

struct Chunk {
  std::string path;
  uint64_t offset = 0, bytes = 0;
};

struct Folder {
  std::string listing;  // names and sizes
  std::vector<Chunk> chunks;
};

Folder list_folder(const std::string& folder) {
  Folder f;
  std::error_code error;
  for (const fs::path& file : model_files(folder)) {
    const uint64_t bytes = fs::file_size(file, error);
    CERTKV_EXPECT(!error, BadFile, "{}: {}", file.string(), error.message());
    const std::string name = file.filename().string();
    f.listing += fmt::format("{} {} {}\n", name.size(), name, bytes);
    for (uint64_t at = 0; at < bytes; at += kChunk)
      f.chunks.push_back({file.string(), at, std::min(kChunk, bytes - at)});
  }
  return f;
}

Sha256 hash_chunk(const Chunk& c, Communicator& world) {
  struct File {
    int fd;
    ~File() {
      if (fd >= 0) ::close(fd);
    }
  } file{::open(c.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  CERTKV_EXPECT(file.fd >= 0, BadFile, "{}: {}", c.path, std::strerror(errno));
  struct Context {
    EVP_MD_CTX* md = EVP_MD_CTX_new();
    ~Context() { EVP_MD_CTX_free(md); }
  } hash;
  Sha256 out;
  bool ok = hash.md != nullptr && EVP_DigestInit_ex(hash.md, EVP_sha256(), nullptr) == 1;
  std::vector<std::byte> buffer(std::min<uint64_t>(kRead, c.bytes));
  for (uint64_t done = 0; ok && done < c.bytes;) {
    const ssize_t n =
        ::pread(file.fd, buffer.data(), std::min<uint64_t>(buffer.size(), c.bytes - done),
                off_t(c.offset + done));
    if (n < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(n > 0, BadFile, "{}: reading failed at byte {}: {}", c.path, c.offset + done,
                  n < 0 ? std::strerror(errno) : "the file became shorter");
    ok = EVP_DigestUpdate(hash.md, buffer.data(), size_t(n)) == 1;
    done += uint64_t(n);
    world.alive();
  }
  ok =
      ok && EVP_DigestFinal_ex(hash.md, reinterpret_cast<unsigned char*>(out.data()), nullptr) == 1;
  CERTKV_EXPECT(ok, CommError, "OpenSSL gives no SHA-256");
  return out;
}

// Others may still load their weights, or read their share of the files.
constexpr std::chrono::minutes kLoading{10};

std::vector<Sha256> gather(const Sha256& mine, Communicator& world) {
  std::vector<Sha256> all(static_cast<size_t>(world.size()));
  Sha256 in = mine;
  world.all_gather({in.data(), in.size(), DType::U8, MemoryKind::Host},
                   {all.data(), all.size() * in.size(), DType::U8, MemoryKind::Host}, {});
  world.wait(kLoading);
  return all;
}

bool all_equal(const std::vector<Sha256>& list) {
  return std::all_of(list.begin(), list.end(), [&](const Sha256& x) { return x == list[0]; });
}

}  // namespace

bool shares_originals(const JobOptions& options) {
  const bool can = options.run.backend == "cpu";
  CERTKV_EXPECT(options.store.reuse != "true" || can, InvalidArgument,
                "store.reuse is true and run.backend is {}: prompts share originals on the cpu "
                "backend alone; set store.reuse to auto or false",
                options.run.backend);
  return can && options.store.reuse != "false";
}

std::optional<Sha256> digest_model(const std::string& folder, Communicator& world,
                                   const Topology& topology) {
  const Folder files = list_folder(folder);
  if (!all_equal(gather(sha256(files.listing), world))) return std::nullopt;
  // The same number of chunks everywhere from here on.
  const size_t n = files.chunks.size();
  std::vector<Sha256> mine(n), all(n * size_t(world.size()));
  for (size_t i = 0; i < n; ++i)
    if (i % size_t(topology.local_size) == size_t(topology.local_rank))
      mine[i] = hash_chunk(files.chunks[i], world);
  if (n > 0) {
    world.all_gather({mine.data(), n * sizeof(Sha256), DType::U8, MemoryKind::Host},
                     {all.data(), all.size() * sizeof(Sha256), DType::U8, MemoryKind::Host}, {});
    world.wait(kLoading);
  }
  std::vector<size_t> local;  // this node's ranks, by local rank
  for (size_t r = 0; r < topology.node_of_rank.size(); ++r)
    if (topology.node_of_rank[r] == topology.node) local.push_back(r);
  std::vector<std::byte> text;
  const auto put = [&](std::span<const std::byte> b) {
    text.insert(text.end(), b.begin(), b.end());
  };
  put(std::as_bytes(std::span(files.listing.data(), files.listing.size())));
  for (size_t i = 0; i < n; ++i) put(all[local[i % local.size()] * n + i]);
  const std::vector<Sha256> nodes = gather(sha256(std::span<const std::byte>(text)), world);
  if (!all_equal(nodes)) return std::nullopt;
  return nodes[0];
}

ContentScope originals_scope(const JobOptions& options, const ModelConfig& config, int tensor,
                             DType dtype, const Sha256& model) {
  std::string text(reinterpret_cast<const char*>(model.data()), model.size());
  // Scales of 8-bit weights are made from each rank's own part of a row.
  const bool any_ranks = options.deterministic && options.model.quantization == "none";
  text += fmt::format(
      " revision {} quantization {} deterministic {} ranks {} backend {} pass {} blas {}",
      kOriginalsRevision, options.model.quantization, options.deterministic, any_ranks ? 0 : tensor,
      options.run.backend, attend_isa(), blas_core());
#if defined(__x86_64__)
  text +=
      fmt::format(" cpu {}{}{}{}", __builtin_cpu_supports("fma") ? 1 : 0,
                  __builtin_cpu_supports("avx2") ? 1 : 0, __builtin_cpu_supports("avx512f") ? 1 : 0,
                  __builtin_cpu_supports("avx512vl") ? 1 : 0);
#endif
  ContentScope scope;
  scope.model = sha256(text);
  scope.layout = sha256(fmt::format("rows of {} elements, blocks of {} tokens, {} layers, {} heads",
                                    config.head_dim, options.cache.block_tokens, config.layers,
                                    config.kv_heads));
  scope.dtype = dtype;
  return scope;
}

uint64_t scope_word(const ContentScope& scope) {
  std::vector<std::byte> both(scope.model.begin(), scope.model.end());
  both.insert(both.end(), scope.layout.begin(), scope.layout.end());
  both.push_back(std::byte(scope.dtype));
  const Sha256 hash = sha256(std::span<const std::byte>(both));
  uint64_t word = 0;
  std::memcpy(&word, hash.data(), sizeof word);
  return word;
}

}  // namespace certkv
