#include "parallel/mpi_session.h"

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/base/log.h"
#include "parallel/mpi_communicator.h"
#include "parallel/mpi_message_channel.h"
#include "parallel/mpi_world.h"
#include "parallel/startup_watch.h"
#include "parallel/topology.h"

namespace certkv {
namespace {

int number_in(const char* variable) {
  const char* text = std::getenv(variable);
  int value = -1;
  if (text != nullptr) std::from_chars(text, text + std::strlen(text), value);
  return value;
}

// A rank must not outlive mpirun's daemon or slurmstepd.
void die_with_parent() {
  const pid_t parent = getppid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) raise(SIGKILL);  // it died in between
}

std::string display_name() {
  const char* node = std::getenv("CERTKV_NODE");
  return node != nullptr && *node != 0 ? std::string(node).substr(0, 63) : host_name();
}

// "rank 3 (node-b)" for all ranks.
std::vector<std::string> gather_names() {
  int rank = 0, size = 0;
  mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  mpi_check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  constexpr int kLength = 64;
  std::vector<char> all(size_t(size) * kLength);
  char own[kLength] = {};
  const std::string name = display_name();
  std::memcpy(own, name.data(), std::min(name.size(), sizeof own - 1));
  mpi_check(MPI_Allgather(own, kLength, MPI_BYTE, all.data(), kLength, MPI_BYTE, MPI_COMM_WORLD),
            "MPI_Allgather");
  std::vector<std::string> names;
  for (int r = 0; r < size; ++r) {
    all[size_t(r + 1) * kLength - 1] = 0;
    names.push_back(fmt::format("rank {} ({})", r, &all[size_t(r) * kLength]));
  }
  return names;
}

}  // namespace

MpiLaunch detect_mpi_launch() {
  MpiLaunch launch;
  if (std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr) {
    launch = {true, "mpirun", number_in("OMPI_COMM_WORLD_RANK"), number_in("OMPI_COMM_WORLD_SIZE")};
  } else if (std::getenv("SLURM_PROCID") != nullptr && std::getenv("SLURM_STEP_ID") != nullptr) {
    // SLURM_PROCID alone is also set in a batch script, which is no rank.
    launch = {true, "srun", number_in("SLURM_PROCID"), number_in("SLURM_STEP_NUM_TASKS")};
  } else if (std::getenv("PMIX_RANK") != nullptr) {
    launch = {true, "PMIx", number_in("PMIX_RANK"), -1};
  } else if (std::getenv("PMI_RANK") != nullptr) {
    launch = {true, "PMI", number_in("PMI_RANK"), number_in("PMI_SIZE")};
  }
  return launch;
}

MpiSession::MpiSession(std::chrono::milliseconds start_limit,
                       std::function<void(const std::string&)> late) {
  int initialised = 0;
  mpi_check(MPI_Initialized(&initialised), "MPI_Initialized");
  CERTKV_EXPECT(!initialised, CommError, "MPI is initialised a second time in this process");
  die_with_parent();
  prctl(PR_SET_TIMERSLACK, 1000UL);  // ns: waits sleep for 20 us, the usual slack is 50 us
  const StartupWatch watch(startup_place(), start_limit, std::move(late));
  int provided = 0;
  mpi_check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
  CERTKV_EXPECT(
      provided >= MPI_THREAD_SERIALIZED, CommError,
      "this MPI gives thread level {}, but MPI_THREAD_SERIALIZED ({}) is needed: use an MPI "
      "that was built with threads",
      provided, int(MPI_THREAD_SERIALIZED));
  mpi_check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  world_ = std::make_shared<MpiWorld>(MPI_COMM_WORLD, gather_names());
  log_set_rank(rank());
}

MpiSession::~MpiSession() {
  finish();
}

int MpiSession::rank() const {
  return world_->rank();
}
int MpiSession::size() const {
  return world_->size();
}

std::unique_ptr<Communicator> MpiSession::world() {
  return make_mpi_communicator(world_, 0);
}

std::unique_ptr<Communicator> MpiSession::tensor_group(const RankLayout& layout) {
  return make_mpi_communicator(world_, layout.replica(rank()));
}

std::unique_ptr<MessageChannel> MpiSession::channel() {
  return make_mpi_message_channel(world_, 0);
}

std::unique_ptr<MessageChannel> MpiSession::leaders_channel(const RankLayout& layout) {
  return make_mpi_message_channel(world_, layout.is_leader(rank()) ? 0 : -1);
}

bool MpiSession::finish() noexcept {
  if (finished_) return true;
  if (!world_->part()) return false;
  world_->mute();
  finished_ = true;
  return MPI_Finalize() == MPI_SUCCESS;
}

void MpiSession::abort(int exit_code) noexcept {
  if (!finished_) {
    world_->mute();
    MPI_Abort(MPI_COMM_WORLD, exit_code);
  }
  _exit(exit_code);
}

}  // namespace certkv
