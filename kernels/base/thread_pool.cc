#include "kernels/base/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/base/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace certkv {
namespace {

// Waking a sleeping thread takes the system tens of microseconds, and a layer of a decode step
// calls the pool a dozen times: between calls threads look for this long before they sleep.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kLooksPerClock = 32;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// True as soon as `ready` is; false after kSpin.
template <typename Ready>
bool spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kLooksPerClock; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

// One word says which call is under way, whether it may still be joined, and how many workers are
// in it. A worker that wakes late finds the call closed and is not waited for.
struct ThreadPool::State {
  static constexpr uint64_t kOpen = uint64_t(1) << 31, kInside = kOpen - 1;
  static uint64_t call_of(uint64_t word) { return word >> 32; }

  std::atomic<uint64_t> word{0};  // call number << 32 | kOpen | workers inside
  std::atomic<bool> stop{false};
  std::mutex
      mutex;  // changes of `word` that sleepers wait for happen under it, or before it is taken
  std::condition_variable wake, done;
  // Of the call under way; written while nobody is inside.
  const std::function<void(size_t)>* body = nullptr;
  size_t count = 0;
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::vector<std::jthread> workers;  // last: they end before what they use

  void drain() {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      try {
        (*body)(i);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
    }
  }

  void work() {
    uint64_t seen = 0;
    const auto called = [&] { return stop.load() || call_of(word.load()) != seen; };
    for (;;) {
      if (!spin_until(called)) {
        std::unique_lock lock(mutex);
        wake.wait(lock, called);
      }
      if (stop.load()) return;
      uint64_t now = word.load();
      while ((now & kOpen) != 0 && !word.compare_exchange_weak(now, now + 1)) {
      }
      seen = call_of(now);
      if ((now & kOpen) == 0) continue;  // came too late
      drain();
      if ((word.fetch_sub(1) & (kOpen | kInside)) == 1) {  // the last one of a closed call
        std::lock_guard lock(mutex);
        done.notify_one();
      }
    }
  }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  CERTKV_EXPECT(threads >= 1, InvalidArgument, "threads is {}: at least 1 is needed", threads);
  for (int i = 1; i < threads; ++i) state_->workers.emplace_back([s = state_.get()] { s->work(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
}

int ThreadPool::threads() const {
  return int(state_->workers.size()) + 1;
}

void ThreadPool::parallel_for(size_t count, const std::function<void(size_t)>& body) {
  State& s = *state_;
  if (s.workers.empty() || count <= 1) {
    for (size_t i = 0; i < count; ++i) body(i);
    return;
  }
  s.body = &body;
  s.count = count;
  s.next = 0;
  s.error = nullptr;
  {
    std::lock_guard lock(s.mutex);
    s.word = (State::call_of(s.word) + 1) << 32 | State::kOpen;
  }
  s.wake.notify_all();
  s.drain();
  s.word.fetch_and(~State::kOpen);
  const auto empty = [&] { return (s.word.load() & State::kInside) == 0; };
  if (!spin_until(empty)) {
    std::unique_lock lock(s.mutex);
    s.done.wait(lock, empty);
  }
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

}  // namespace certkv
