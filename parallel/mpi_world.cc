#include "parallel/mpi_world.h"

#include "kernels/base/log.h"
#include "parallel/mpi_heart.h"
#include "parallel/verdict_reduce.h"

namespace certkv {
namespace {

void merge_votes(void* from, void* into, int* records, MPI_Datatype*) {
  merge_verdict_words(static_cast<uint64_t*>(into), static_cast<const uint64_t*>(from),
                      size_t(*records));
}

MPI_Comm duplicate(MPI_Comm comm) {
  MPI_Comm copy = MPI_COMM_NULL;
  mpi_check(MPI_Comm_dup(comm, &copy), "MPI_Comm_dup");
  mpi_check(MPI_Comm_set_errhandler(copy, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  return copy;
}

int rank_in(MPI_Comm comm) {
  int rank = 0;
  mpi_check(MPI_Comm_rank(comm, &rank), "MPI_Comm_rank");
  return rank;
}

}  // namespace

void mpi_check(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  CERTKV_THROW(CommError, "{}: {}", call, text);
}

MpiWorld::MpiWorld(MPI_Comm world, std::vector<std::string> names)
    : world_(duplicate(world)), rank_(rank_in(world)), life_(std::move(names)) {
  mpi_check(MPI_Type_contiguous(kVerdictWords, MPI_UINT64_T, &verdict_type_), "MPI_Type_contiguous");
  mpi_check(MPI_Type_commit(&verdict_type_), "MPI_Type_commit");
  mpi_check(MPI_Op_create(merge_votes, 1, &verdict_op_), "MPI_Op_create");
  heart_ = std::make_unique<MpiHeart>(*this, duplicate(world));
}

MpiWorld::~MpiWorld() { mute(); }

std::unique_lock<std::mutex> MpiWorld::enter() {
  std::unique_lock lock(mutex_);
  if (muted_ || life_.broken()) {
    muted_ = true;
    lock.unlock();
    throw_broken();
  }
  return lock;
}

void MpiWorld::throw_broken() {
  mute();
  life_.throw_if_broken();
  CERTKV_THROW(CommError, "MPI has been shut down");
}

void MpiWorld::fail(ErrorKind kind, const std::string& message) noexcept {
  const bool first = life_.break_with(kind, message);
  const std::lock_guard lock(mutex_);
  if (first && !muted_) heart_->send_note(kind, message);
  muted_ = true;
}

void MpiWorld::mute() noexcept {
  const std::lock_guard lock(mutex_);
  muted_ = true;
}

bool MpiWorld::muted() const {
  const std::lock_guard lock(mutex_);
  return muted_;
}

bool MpiWorld::part() noexcept {
  if (muted() || life_.broken()) return false;
  try {
    return heart_->part();
  } catch (const std::exception& error) {
    log_error("{}", error.what());
    return false;
  }
}

MPI_Comm MpiWorld::split(int color) {
  const auto lock = enter();
  MPI_Comm group = MPI_COMM_NULL;
  mpi_check(MPI_Comm_split(world_, color < 0 ? MPI_UNDEFINED : color, rank_, &group),
            "MPI_Comm_split");
  if (group != MPI_COMM_NULL) {
    mpi_check(MPI_Comm_set_errhandler(group, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
  return group;
}

std::vector<int> MpiWorld::members(MPI_Comm comm) {
  const auto lock = enter();
  MPI_Group all = MPI_GROUP_NULL, group = MPI_GROUP_NULL;
  int size = 0;
  mpi_check(MPI_Comm_size(comm, &size), "MPI_Comm_size");
  mpi_check(MPI_Comm_group(world_, &all), "MPI_Comm_group");
  mpi_check(MPI_Comm_group(comm, &group), "MPI_Comm_group");
  std::vector<int> in_group(static_cast<size_t>(size)), in_world(in_group.size());
  for (int r = 0; r < size; ++r) in_group[size_t(r)] = r;
  mpi_check(MPI_Group_translate_ranks(group, size, in_group.data(), all, in_world.data()),
            "MPI_Group_translate_ranks");
  MPI_Group_free(&group);
  MPI_Group_free(&all);
  return in_world;
}

int MpiWorld::next_group_slot() {
  CERTKV_EXPECT(groups_ < LifeTable::kGroups, InvalidArgument,
                "a job can have at most {} groups of ranks", LifeTable::kGroups);
  return groups_++;
}

}  // namespace certkv
