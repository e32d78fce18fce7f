// Work of the host beside the caller's own: what nobody waits for until finish().
//
// THREADS: calls come from one thread.
#pragma once

#include <cstddef>
#include <functional>
#include <future>
#include <utility>

#include "kernels/base/thread_pool.h"

namespace certkv {

class BackgroundWork {
 public:
  explicit BackgroundWork(int threads) : pool_(threads) {}
  ~BackgroundWork() { wait(); }

  // Runs body(i) for every i in [0, count) on threads of its own, once what was begun before is
  // done; not at all if that failed. What the body reads must stay until finish() or wait().
  void start(size_t count, std::function<void(size_t)> body) {
    running_ = std::async(std::launch::async, [this, count, body = std::move(body),
                                               before = std::move(running_)]() mutable {
      if (before.valid()) before.get();
      pool_.parallel_for(count, body);
    });
  }
  // Until it is done; throws the first error of the work, once.
  void finish() {
    if (running_.valid()) running_.get();
  }
  // The same without the error, which is kept for finish().
  void wait() const noexcept {
    if (running_.valid()) running_.wait();
  }

 private:
  ThreadPool pool_;
  std::future<void> running_;
};

}  // namespace certkv
