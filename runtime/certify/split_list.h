// The splits of several heads' passes as one list of stretches, spread over a pool: a few long
// sequences use every thread, and a stretch of several splits reads memory more evenly than one.
// What comes out does not depend on how the list is cut.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/base/thread_pool.h"

namespace certkv {

class SplitList {
 public:
  void clear() { first_.assign(1, 0); }
  // The next task has `splits` splits; 0: it takes no part.
  void add(size_t splits) { first_.push_back(first_.back() + splits); }

  // body(task, first, last) for splits [first, last) of a task. THREADS: at the same time. Rethrows
  // the first exception of a body.
  template <typename Body>
  void run(ThreadPool& pool, const Body& body) const {
    const size_t all = first_.back();
    const size_t stretch = std::clamp<size_t>(all / (kShares * size_t(pool.threads())), 1, kMost);
    pool.parallel_for((all + stretch - 1) / stretch, [&](size_t i) {
      const size_t end = std::min(all, (i + 1) * stretch);
      for (size_t at = i * stretch; at < end;) {
        const auto after = std::upper_bound(first_.begin(), first_.end(), at);
        const size_t last = std::min(end, *after);
        const auto task = size_t(after - first_.begin()) - 1;
        body(task, at - first_[task], last - first_[task]);
        at = last;
      }
    });
  }

 private:
  static constexpr size_t kShares = 4;  // stretches a thread, so that none waits long at the end
  static constexpr size_t kMost = 8;    // splits of a stretch
  std::vector<size_t> first_ = {0};     // first split of each task within the list, and the end
};

}  // namespace certkv
