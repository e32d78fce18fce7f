// Threads of one rank. The caller takes part in the work, so a pool of 1 starts no thread.
//
// Results must not depend on which thread runs a task: tasks write to places of their own and are
// combined by the caller in a fixed order.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace certkv {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // throws InvalidArgument below 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Runs body(i) for every i in [0, count), returns when all have ended. The first exception thrown
  // is rethrown here after the others have ended. Not reentrant.
  void parallel_for(size_t count, const std::function<void(size_t)>& body);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace certkv
