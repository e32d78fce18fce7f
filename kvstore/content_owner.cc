#include "kvstore/content_owner.h"

#include <openssl/evp.h>

#include <cstring>

#include "kernels/base/error.h"
#include "kvstore/control.h"

namespace certkv {
namespace {

constexpr uint64_t kContent = uint64_t(1) << 63;

OwnerId owner_of(const Sha256& hash) {
  OwnerId owner;
  std::memcpy(&owner.hi, hash.data(), 8);
  std::memcpy(&owner.lo, hash.data() + 8, 8);
  owner.hi |= kContent;
  return owner;
}

template <typename T>
void put(std::vector<std::byte>& to, std::span<const T> values) {
  const auto bytes = std::as_bytes(values);
  to.insert(to.end(), bytes.begin(), bytes.end());
}

}  // namespace

Sha256 sha256(std::span<const std::byte> bytes) {
  Sha256 hash;
  unsigned length = 0;
  CERTKV_EXPECT(
      EVP_Digest(bytes.data(), bytes.size(), reinterpret_cast<unsigned char*>(hash.data()), &length,
                 EVP_sha256(), nullptr) == 1 &&
          length == hash.size(),
      CommError, "OpenSSL gives no SHA-256");
  return hash;
}

Sha256 sha256(std::string_view text) {
  return sha256(std::as_bytes(std::span(text.data(), text.size())));
}

std::vector<OwnerId> content_owners(std::span<const int32_t> tokens, const ContentScope& scope) {
  std::vector<OwnerId> owners;
  Sha256 before = sha256("certkv originals, format 1");
  std::vector<std::byte> input;
  for (size_t end = kSegmentTokens; end <= tokens.size(); end += kSegmentTokens) {
    // Every part has a fixed length, so no two different inputs are the same bytes.
    input.clear();
    put(input, std::span<const std::byte>(before));
    put(input, std::span<const std::byte>(scope.model));
    put(input, std::span<const std::byte>(scope.layout));
    input.push_back(std::byte(scope.dtype));
    put(input, tokens.subspan(end - kSegmentTokens, kSegmentTokens));
    before = sha256(input);
    owners.push_back(owner_of(before));
  }
  return owners;
}

OwnerId lasting_owner() {
  return {random_u64() | kContent, random_u64()};
}

}  // namespace certkv
