#include "runtime/request_wire.h"

#include <cstring>
#include <string>
#include <type_traits>

#include "kernels/base/error.h"

namespace certkv {
namespace {

class Writer {
 public:
  template <typename T>
  void put(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto* p = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), p, p + sizeof value);
  }
  template <typename T>
  void put_all(const T* data, size_t count) {
    put(uint64_t(count));
    const auto* p = reinterpret_cast<const std::byte*>(data);
    bytes.insert(bytes.end(), p, p + count * sizeof(T));
  }
  std::vector<std::byte> bytes;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> b) : left_(b) {}
  template <typename T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  template <typename C>
  C get_all() {
    const uint64_t count = get<uint64_t>();
    CERTKV_EXPECT(count <= left_.size() / sizeof(typename C::value_type), CommError,
                  "a request of {} elements in {} bytes", count, left_.size());
    C out;
    out.resize(size_t(count));
    const size_t bytes = size_t(count) * sizeof(typename C::value_type);
    if (bytes > 0) std::memcpy(out.data(), take(bytes), bytes);
    return out;
  }
  bool done() const { return left_.empty(); }

 private:
  const std::byte* take(size_t n) {
    CERTKV_EXPECT(n <= left_.size(), CommError, "a request ends {} bytes early", n - left_.size());
    const std::byte* p = left_.data();
    left_ = left_.subspan(n);
    return p;
  }
  std::span<const std::byte> left_;
};

}  // namespace

std::vector<std::byte> encode_request(const Request& r) {
  Writer w;
  w.put(r.id);
  w.put_all(r.prompt.data(), r.prompt.size());
  w.put(r.sampling.max_tokens);
  w.put(r.sampling.temperature);
  w.put(r.sampling.top_p);
  w.put(r.sampling.top_k);
  w.put(r.sampling.seed);
  w.put(uint64_t(r.sampling.stop.size()));
  for (const std::string& s : r.sampling.stop) w.put_all(s.data(), s.size());
  w.put(r.policy);
  w.put(r.tolerance.is_relative);
  w.put(r.tolerance.value);
  w.put_all(r.compare.data(), r.compare.size());
  w.put(r.policy_is_job_wide);
  w.put_all(r.names.data(), r.names.size());
  w.put(uint64_t(r.resumed.size()));
  for (const AnswerState& a : r.resumed) {
    w.put(a.policy);
    w.put_all(a.tokens.data(), a.tokens.size());
    AnswerProgress sealed;
    sealed.sealed = a.sealed;
    const std::string text = encode_progress(sealed);
    w.put_all(text.data(), text.size());
  }
  return std::move(w.bytes);
}

Request decode_request(std::span<const std::byte> bytes) {
  Reader in(bytes);
  Request r;
  r.id = in.get<uint64_t>();
  r.prompt = in.get_all<std::vector<int32_t>>();
  r.sampling.max_tokens = in.get<int64_t>();
  r.sampling.temperature = in.get<double>();
  r.sampling.top_p = in.get<double>();
  r.sampling.top_k = in.get<int64_t>();
  r.sampling.seed = in.get<uint64_t>();
  const uint64_t stops = in.get<uint64_t>();
  for (uint64_t i = 0; i < stops; ++i) r.sampling.stop.push_back(in.get_all<std::string>());
  r.policy = in.get<Policy>();
  r.tolerance.is_relative = in.get<bool>();
  r.tolerance.value = in.get<double>();
  r.compare = in.get_all<std::vector<Policy>>();
  r.policy_is_job_wide = in.get<bool>();
  r.names = in.get_all<std::vector<OwnerId>>();
  const uint64_t resumed = in.get<uint64_t>();
  for (uint64_t i = 0; i < resumed; ++i) {
    AnswerState a;
    a.policy = in.get<Policy>();
    a.tokens = in.get_all<std::vector<int32_t>>();
    a.sealed = decode_progress(in.get_all<std::string>()).sealed;
    r.resumed.push_back(std::move(a));
  }
  CERTKV_EXPECT(in.done(), CommError, "a request has bytes left over");
  return r;
}

}  // namespace certkv
