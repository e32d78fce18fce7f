#include "tests/support/thread_ranks.h"

#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace certkv {

void run_thread_ranks(int ranks, const std::function<void(LocalWorld&, int)>& body) {
  const std::shared_ptr<LocalWorld> world = LocalWorld::create(ranks);
  struct Failure {
    std::exception_ptr error;
    std::string what;
  };
  std::mutex mutex;
  std::vector<Failure> failures;  // in the order of their coming
  const auto failed = [&](int rank, const char* why) {
    {
      const std::lock_guard lock(mutex);
      failures.push_back({std::current_exception(), why});
    }
    world->abort(rank, why);
  };
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(*world, r);
      } catch (const std::exception& error) {
        failed(r, error.what());
      } catch (...) {
        failed(r, "unknown exception");
      }
    });
  }
  for (std::thread& t : threads) t.join();
  if (failures.empty()) return;
  // Ranks that only report that the world is broken may overtake the one that broke it.
  const std::string broken = world->life().failure();
  for (const Failure& f : failures) {
    if (f.what != broken) std::rethrow_exception(f.error);
  }
  std::rethrow_exception(failures.front().error);
}

void run_thread_ranks(int ranks, const std::function<void(Communicator&)>& body) {
  run_thread_ranks(ranks, [&](LocalWorld& world, int rank) {
    const std::unique_ptr<Communicator> communicator = world.communicator(rank);
    body(*communicator);
  });
}

}  // namespace certkv
