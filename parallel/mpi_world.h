// What everything that speaks MPI in this process shares. Only the mpi_*.cc files include it.
//
// MPI is initialised with MPI_THREAD_SERIALIZED: two threads call it, the rank's own and the
// heartbeat, one at a time, each call under `mutex`. No call made under it blocks, so that the heart
// goes on beating while the rank waits.
//
// After a failure MPI is `muted`: nobody calls it any more, so that nothing is written into memory
// whose owner has given up waiting for it. Only MPI_Abort remains.
#pragma once

#define OMPI_SKIP_MPICXX 1
#include <mpi.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/error.h"
#include "parallel/liveness.h"

namespace certkv {

// Throws CommError with MPI's own text.
void mpi_check(int code, const char* call);

class MpiHeart;

class MpiWorld {
 public:
  // Collective; MPI is initialised. names: of all ranks.
  MpiWorld(MPI_Comm world, std::vector<std::string> names);
  ~MpiWorld();

  int rank() const { return rank_; }
  int size() const { return life_.ranks(); }
  LifeTable& life() { return life_; }

  // Locks MPI for a few calls. Throws the first failure if MPI is muted or the job is broken.
  std::unique_lock<std::mutex> enter();

  // This rank has found a failure: tells the others, then mutes MPI. The first failure stands.
  void fail(ErrorKind kind, const std::string& message) noexcept;
  // Mutes MPI and throws the failure that is known.
  [[noreturn]] void throw_broken();

  // Says goodbye to all ranks and stops the heart. False if a rank did not answer.
  bool part() noexcept;
  void mute() noexcept;
  bool muted() const;

  // Collective over the world, for set-up only (blocks): a communicator of the ranks with this
  // colour, in rank order; MPI_COMM_NULL for a negative colour.
  MPI_Comm split(int color);
  std::vector<int> members(MPI_Comm comm);  // ranks of the world, in the order of the group
  int next_group_slot();

  MPI_Datatype verdict_type() const { return verdict_type_; }
  MPI_Op verdict_op() const { return verdict_op_; }

 private:
  MPI_Comm world_;
  int rank_ = 0;
  int groups_ = 0;
  LifeTable life_;
  mutable std::mutex mutex_;
  bool muted_ = false;  // under mutex_
  MPI_Datatype verdict_type_ = MPI_DATATYPE_NULL;
  MPI_Op verdict_op_ = MPI_OP_NULL;
  std::unique_ptr<MpiHeart> heart_;
  friend class MpiHeart;
};

}  // namespace certkv
