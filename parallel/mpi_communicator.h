// The communicator over MPI: non-blocking collectives, polled while the peers' signs of life are
// watched. Host memory only.
//
// F32 sums use MPI's own order, which in Open MPI gives every rank the same bits; 16-bit sums gather
// and add in rank order. One gather (its output) or broadcast has at most 2^31 - 1 bytes
// (InvalidArgument above); sums may be of any size.
#pragma once

#include <memory>

#include "parallel/communicator.h"

namespace certkv {

class MpiWorld;

// Collective over the whole world: every rank names a colour, those with the same one form a group in
// rank order. Null for a negative colour. Blocks; for set-up.
std::unique_ptr<Communicator> make_mpi_communicator(std::shared_ptr<MpiWorld> world, int color);

}  // namespace certkv
