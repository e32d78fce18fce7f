// Messages over MPI.
#pragma once

#include <memory>

#include "parallel/message_channel.h"

namespace certkv {

class MpiWorld;

// Collective over the whole world, as make_mpi_communicator.
std::unique_ptr<MessageChannel> make_mpi_message_channel(std::shared_ptr<MpiWorld> world, int color);

}  // namespace certkv
