#include "runtime/audit/format.h"

#include <fmt/format.h>
#include <openssl/evp.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <filesystem>

#include "kernels/base/error.h"

namespace certkv::audit {

static_assert(std::endian::native == std::endian::little, "runtime/AUDIT.md is little-endian");

std::string hex(const Digest& digest) {
  std::string text;
  for (uint8_t byte : digest) text += fmt::format("{:02x}", byte);
  return text;
}

struct DigestChain::Hash {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~Hash() { EVP_MD_CTX_free(context); }
};

DigestChain::DigestChain() : hash_(std::make_unique<Hash>()) {
  unsigned bytes = 0;
  CERTKV_EXPECT(hash_->context != nullptr && EVP_Digest(kMagic.data(), kMagic.size(), last_.data(),
                                                        &bytes, EVP_sha256(), nullptr) == 1,
                OutOfMemory, "SHA-256 of OpenSSL cannot be started");
}

DigestChain::~DigestChain() = default;

const Digest& DigestChain::add(std::string_view head, std::string_view payload) {
  EVP_MD_CTX* c = hash_->context;
  unsigned bytes = 0;
  CERTKV_EXPECT(EVP_DigestInit_ex(c, EVP_sha256(), nullptr) == 1 &&
                    EVP_DigestUpdate(c, last_.data(), last_.size()) == 1 &&
                    EVP_DigestUpdate(c, head.data(), head.size()) == 1 &&
                    EVP_DigestUpdate(c, payload.data(), payload.size()) == 1 &&
                    EVP_DigestFinal_ex(c, last_.data(), &bytes) == 1,
                OutOfMemory, "SHA-256 of OpenSSL failed");
  return last_;
}

namespace {

size_t padded(size_t bytes) {
  return (bytes + 7) / 8 * 8;
}

size_t head_bytes(size_t blocks, size_t head_dim) {
  return sizeof(HeadHead) + sizeof(HeadFigures) + 8 * blocks + padded(2 * 4 * head_dim) +
         padded(2 * 4 * blocks) + padded(blocks);
}
size_t record_bytes(size_t heads, size_t blocks, size_t head_dim) {
  return sizeof(RecordHead) + padded(4 * blocks) + heads * head_bytes(blocks, head_dim);
}

void pad(std::string& out) {
  out.resize(padded(out.size()), '\0');
}

struct Reader {
  std::string_view rest;
  bool zero_padding = true;
  template <typename T>
  void get(T* value) {
    std::memcpy(value, rest.data(), sizeof *value);
    rest.remove_prefix(sizeof *value);
  }
  template <typename T>
  void get(size_t n, std::vector<T>* values) {
    values->resize(n);
    std::memcpy(values->data(), rest.data(), n * sizeof(T));
    rest.remove_prefix(n * sizeof(T));
  }
  void skip(size_t bytes) {  // padding
    for (size_t i = 0; i < bytes; ++i) zero_padding = zero_padding && rest[i] == '\0';
    rest.remove_prefix(bytes);
  }
};

}  // namespace

std::string encode(const Record& r) {
  std::string out;
  out.reserve(record_bytes(r.heads.size(), r.head.blocks, r.heads[0].q.size()));
  put(out, r.head);
  put_all<float>(out, r.nu);
  pad(out);
  for (const HeadRecord& h : r.heads) {
    put(out, h.head);
    put(out, h.figures);
    put_all<double>(out, h.mass);
    put_all<float>(out, h.q);
    put_all<float>(out, h.out);
    pad(out);
    put_all<float>(out, h.delta);
    put_all<float>(out, h.eta);
    pad(out);
    put_all<uint8_t>(out, h.used);
    pad(out);
  }
  return out;
}

std::string decode(std::string_view payload, size_t d, Record* r) {
  if (payload.size() < sizeof(RecordHead)) return "a record shorter than its head";
  Reader in{payload};
  in.get(&r->head);
  const size_t heads = r->head.heads, blocks = r->head.blocks;
  if (heads == 0 || heads > 1024 || blocks == 0 || blocks > payload.size())
    return fmt::format("a record of {} heads and {} blocks", heads, blocks);
  if (record_bytes(heads, blocks, d) != payload.size())
    return fmt::format("a record of {} heads and {} blocks has {} bytes, it should have {}", heads,
                       blocks, payload.size(), record_bytes(heads, blocks, d));
  in.get(blocks, &r->nu);
  in.skip(padded(4 * blocks) - 4 * blocks);
  r->heads.resize(heads);
  for (HeadRecord& h : r->heads) {
    in.get(&h.head);
    in.get(&h.figures);
    in.get(blocks, &h.mass);
    in.get(d, &h.q);
    in.get(d, &h.out);
    in.skip(padded(8 * d) - 8 * d);
    in.get(blocks, &h.delta);
    in.get(blocks, &h.eta);
    in.skip(padded(8 * blocks) - 8 * blocks);
    in.get(blocks, &h.used);
    in.skip(padded(blocks) - blocks);
    in.zero_padding = in.zero_padding && h.head.zero == 0;
  }
  return in.zero_padding ? "" : "a record whose padding is not zero";
}

std::string file_name(int session, int rank) {
  return fmt::format("audit-{:03}-rank-{:04}{}", session, rank, kExtension);
}

int next_session(const std::string& folder) {
  int next = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    int session = 0;
    if (!name.starts_with("audit-") || !name.ends_with(kExtension)) continue;
    std::from_chars(name.data() + 6, name.data() + name.size(), session);
    next = std::max(next, session + 1);
  }
  return next;
}

}  // namespace certkv::audit
