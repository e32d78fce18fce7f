// The heartbeat among MPI ranks: a thread per rank that sends every other rank a small message with
// its signs of life, and keeps this rank's LifeTable from theirs.
//
// The thread proves only that the process runs (`beat`). The life of the working threads travels as
// the age of their last stamp, so a rank whose work hangs is found out although its heart beats.
// Works the same within a node and across nodes, on any transport MPI has. A failure travels as a
// note in the same message, so that the others learn the reason before they notice the silence.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "parallel/mpi_world.h"

namespace certkv {

class MpiHeart {
 public:
  // `comm`: of all ranks, used for nothing else.
  MpiHeart(MpiWorld& world, MPI_Comm comm);
  ~MpiHeart();  // ends the thread; MPI must be muted, or part() have been called

  // Under the world's mutex: sends the failure to all ranks that take it within kNoteTime.
  void send_note(ErrorKind kind, const std::string& message) noexcept;

  // Exchanges goodbyes with all ranks. False if one fell silent.
  bool part();

  static constexpr std::chrono::milliseconds kInterval{100};
  static constexpr std::chrono::milliseconds kNoteTime{300};
  static constexpr std::chrono::milliseconds kPartingTime{60000};

 private:
  enum class Kind : uint32_t { Beat = 1, Note = 2, Goodbye = 3 };
  // The bytes of a heartbeat; all ranks run the same program on machines of one byte order.
  struct Message {
    Kind kind = Kind::Beat;
    uint32_t error_kind = 0;   // Note
    int64_t work_age_ns = 0;   // since the last sign of life of the working threads
    int32_t waits_for = -1;
    int32_t reserved = 0;
    uint64_t arrived[LifeTable::kGroups] = {};
    char text[512] = {};       // Note
  };
  struct Peer {
    int rank = 0;
    Message out;               // one under way at a time: a stopped peer must not pile them up
    MPI_Request request = MPI_REQUEST_NULL;
    bool said_goodbye = false;  // to it
    std::atomic<bool> has_gone{false};
  };
  void loop();
  bool beat();     // under the mutex; true when the goodbyes are complete
  void receive();  // under the mutex
  Message message(Kind kind) const;

  MpiWorld& world_;
  MPI_Comm comm_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::atomic<bool> parting_{false}, stop_{false}, parted_{false};
  std::vector<Message> notes_;            // memory of sends that may never end
  std::thread thread_;
};

}  // namespace certkv
