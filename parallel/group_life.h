// What one group's communicator lets another one, laid over the same ranks, know and do about their
// life: NCCL has no time-outs and no names, so its communicator watches its peers through the group
// that it was set up over (parallel/nccl_communicator.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/base/error.h"

namespace certkv {

class LifeTable;

class GroupLife {
 public:
  virtual ~GroupLife() = default;

  virtual LifeTable& life() = 0;
  virtual const std::vector<int>& members() const = 0;  // ranks of the table, by rank of the group

  // Operations of the upper communicator that this rank has begun to wait for, and that member
  // `rank` of the group is known to have. They are the group's own count, carried on: nobody uses
  // the lower communicator for operations once it carries another.
  virtual void set_upper_arrived(uint64_t operations) noexcept = 0;
  virtual uint64_t upper_arrived(int rank) const = 0;

  // Breaks all groups of the job and tells the other ranks. The first failure stands.
  virtual void fail(ErrorKind kind, const std::string& message) noexcept = 0;
};

}  // namespace certkv
