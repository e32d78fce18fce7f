// Until all ranks of a job have met: who is here, and, when the time is over, who is not.
//
// MPI_Init has no deadline, and knows nothing of a rank that never calls it. A rank that comes
// leaves a mark on its host, an abstract socket that goes with the process; when the others have
// not come in time, the first rank that did come on each host says in one line which of that host's
// ranks are missing. A host on which no rank came has nobody to say so: the other hosts then say
// that all of theirs are here.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace certkv {

// What a launcher tells a rank of its place on its host.
struct StartupPlace {
  std::string job;           // the same for all ranks of a start, and for no other start
  int rank = -1, size = -1;  // in the job
  int local_rank = -1, local_size = -1;
  std::vector<int> host_ranks;  // the ranks of this host, by local rank, where the launcher tells
  bool known() const { return !job.empty() && rank >= 0 && local_rank >= 0 && local_size > 0; }
};
StartupPlace startup_place();  // from the environment, as mpirun and srun set it

struct Arrival {
  int local_rank = 0, rank = 0;
};
// One line: which ranks of this host are not among the arrivals. UNITS: limit as it was waited
std::string startup_diagnosis(const StartupPlace& place, const std::vector<Arrival>& arrivals,
                              const std::string& host, std::chrono::milliseconds limit);

class StartupWatch {
 public:
  // `late` is called once, from a thread of the watch, when the limit is over: with the diagnosis,
  // or an empty text where another rank of this host says it. A limit of 0, or a launcher that does
  // not tell the rank's place: nothing is watched.
  StartupWatch(StartupPlace place, std::chrono::milliseconds limit,
               std::function<void(const std::string&)> late);
  ~StartupWatch();  // all have met
  StartupWatch(const StartupWatch&) = delete;
  StartupWatch& operator=(const StartupWatch&) = delete;

 private:
  void watch();
  StartupPlace place_;
  std::chrono::milliseconds limit_;
  std::function<void(const std::string&)> late_;
  int mark_ = -1;
  std::mutex mutex_;
  std::condition_variable met_;
  bool done_ = false;
  std::thread thread_;
};

}  // namespace certkv
