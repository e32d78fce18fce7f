// What every Communicator and MessageChannel promises, as checks that all ranks of a group run
// together; the programs beside it run them on thread ranks and under mpirun.
#pragma once

#include <string>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/message_channel.h"

namespace certkv {

struct CommunicatorCase {
  const char* sentence;
  void (*check)(Communicator&);  // called on every rank; reports by EXPECT
};
const std::vector<CommunicatorCase>& communicator_contract();

struct ChannelCase {
  const char* sentence;
  void (*check)(MessageChannel&);
};
const std::vector<ChannelCase>& channel_contract();

}  // namespace certkv
