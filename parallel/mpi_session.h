// MPI from its initialisation to its end, and the groups of a job's ranks.
//
// Needs MPI_THREAD_SERIALIZED: the heartbeat is a second thread (parallel/mpi_world.h). MPI_Init
// blocks without a deadline of its own; a StartupWatch has one. The making of groups has none.
//
// THREADS: one thread per rank, but for abort().
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "parallel/communicator.h"
#include "parallel/message_channel.h"
#include "parallel/rank_layout.h"

namespace certkv {

class MpiWorld;

// How this process was started, from its environment alone.
struct MpiLaunch {
  bool by_launcher = false;  // under mpirun or srun
  std::string launcher;      // "mpirun", "srun", "PMI"
  int rank = -1;             // -1: not told
  int size = -1;
};
MpiLaunch detect_mpi_launch();

class MpiSession {
 public:
  // Initialises MPI; collective over the job. The process is killed when its launcher dies.
  // CommError if MPI cannot be initialised or lacks the thread level. Once per process.
  // start_limit: until all ranks have met; then `late` is called, as parallel/startup_watch.h says,
  // and has to end the process. 0: none.
  explicit MpiSession(std::chrono::milliseconds start_limit = {},
                      std::function<void(const std::string&)> late = {});
  ~MpiSession();  // finish()
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  int rank() const;
  int size() const;

  // All are collective over the job and called in the same order by all ranks.
  std::unique_ptr<Communicator> world();
  std::unique_ptr<Communicator> tensor_group(const RankLayout& layout);       // of this replica
  std::unique_ptr<MessageChannel> channel();                                  // of all ranks
  std::unique_ptr<MessageChannel> leaders_channel(const RankLayout& layout);  // null on others

  // Ends MPI with the other ranks. Communicators and channels are of no use afterwards. False, and
  // MPI is left as it is, if the job is broken: call abort() then. Waits for ranks that still work.
  bool finish() noexcept;

  // Ends all processes of the job; mpirun returns exit_code. For launcher/main.cc.
  [[noreturn]] void abort(int exit_code) noexcept;

 private:
  std::shared_ptr<MpiWorld> world_;
  bool finished_ = false;
};

}  // namespace certkv
