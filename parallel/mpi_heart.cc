#include "parallel/mpi_heart.h"

#include <signal.h>

#include <algorithm>
#include <cstring>

#include "kernels/base/deadline.h"
#include "kernels/base/failpoint.h"
#include "kernels/base/log.h"
#include "parallel/communicator.h"

namespace certkv {
namespace {
constexpr int kTag = 1;
}

MpiHeart::MpiHeart(MpiWorld& world, MPI_Comm comm) : world_(world), comm_(comm) {
  for (int r = 0; r < world.size(); ++r) {
    if (r == world.rank()) continue;
    peers_.push_back(std::make_unique<Peer>());
    peers_.back()->rank = r;
  }
  notes_.resize(peers_.size());
  if (!peers_.empty()) thread_ = std::thread([this] { loop(); });
}

MpiHeart::~MpiHeart() {
  stop_ = true;
  if (thread_.joinable()) thread_.join();
}

MpiHeart::Message MpiHeart::message(Kind kind) const {
  LifeTable& life = world_.life();
  Message m;
  m.kind = kind;
  m.work_age_ns = std::max<int64_t>(0, steady_ns() - life.work(world_.rank()));
  m.waits_for = life.waits_for(world_.rank());
  for (int g = 0; g < LifeTable::kGroups; ++g) m.arrived[g] = life.arrived(world_.rank(), g);
  return m;
}

void MpiHeart::loop() {
  sigset_t all;  // signals are for the threads of the job
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  while (!stop_) {
    {
      const std::lock_guard lock(world_.mutex_);
      if (world_.muted_) return;
      try {
        CERTKV_FAILPOINT(ranks_beat);
        receive();
        if (beat()) {
          parted_ = true;
          return;
        }
      } catch (const Error& error) {
        // Beats that fail are silence to the others; here the reason is known.
        world_.life().break_with(error.kind(), fmt::format("heartbeat: {}", error.what()));
        return;
      }
    }
    // Goodbyes are awaited, beats are not.
    std::this_thread::sleep_for(parting_ ? kInterval / 20 : kInterval);
  }
}

bool MpiHeart::beat() {
  bool complete = parting_;
  for (const auto& peer : peers_) {
    int sent = 1;
    mpi_check(MPI_Test(&peer->request, &sent, MPI_STATUS_IGNORE), "MPI_Test");
    if (sent && !peer->said_goodbye) {
      peer->out = message(parting_ ? Kind::Goodbye : Kind::Beat);
      peer->said_goodbye = peer->out.kind == Kind::Goodbye;
      mpi_check(MPI_Isend(&peer->out, int(sizeof(Message)), MPI_BYTE, peer->rank, kTag, comm_,
                          &peer->request),
                "MPI_Isend");
      sent = 0;
    }
    complete = complete && sent && peer->said_goodbye && peer->has_gone;
  }
  return complete;
}

void MpiHeart::receive() {
  LifeTable& life = world_.life();
  while (true) {
    int here = 0;
    MPI_Message handle = MPI_MESSAGE_NULL;
    MPI_Status status{};
    mpi_check(MPI_Improbe(MPI_ANY_SOURCE, kTag, comm_, &here, &handle, &status), "MPI_Improbe");
    if (!here) return;
    int bytes = 0;
    mpi_check(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count");
    CERTKV_EXPECT(bytes == int(sizeof(Message)), CommError,
                  "a heartbeat of {} bytes from rank {}: all ranks must run the same build", bytes,
                  status.MPI_SOURCE);
    Message m;
    // Far below any eager limit: the bytes came with the match, this does not block.
    mpi_check(MPI_Mrecv(&m, int(sizeof m), MPI_BYTE, &handle, &status), "MPI_Mrecv");
    const int from = status.MPI_SOURCE;
    const int64_t now = steady_ns();
    life.stamp_beat(from, now);
    life.stamp_work(from, now - std::max<int64_t>(0, m.work_age_ns));
    life.set_waits_for(from, m.waits_for >= 0 && m.waits_for < life.ranks() ? m.waits_for : -1);
    for (int g = 0; g < LifeTable::kGroups; ++g) life.set_arrived(from, g, m.arrived[g]);
    if (m.kind == Kind::Note) {
      m.text[sizeof m.text - 1] = 0;
      const bool silent = m.error_kind == uint32_t(ErrorKind::DeadlineExceeded);
      life.break_with(silent ? ErrorKind::DeadlineExceeded : ErrorKind::CommError, m.text);
    }
    if (m.kind == Kind::Goodbye) {
      for (const auto& peer : peers_) {
        if (peer->rank == from) peer->has_gone = true;
      }
    }
  }
}

void MpiHeart::send_note(ErrorKind kind, const std::string& text) noexcept {
  Message note = message(Kind::Note);
  note.error_kind = uint32_t(kind);
  std::memcpy(note.text, text.data(), std::min(text.size(), sizeof note.text - 1));
  std::vector<MPI_Request> requests(peers_.size(), MPI_REQUEST_NULL);
  for (size_t i = 0; i < peers_.size(); ++i) {
    notes_[i] = note;
    if (MPI_Isend(&notes_[i], int(sizeof note), MPI_BYTE, peers_[i]->rank, kTag, comm_,
                  &requests[i]) != MPI_SUCCESS) {
      requests[i] = MPI_REQUEST_NULL;
    }
  }
  const Deadline end = Deadline::after(kNoteTime);
  int all = requests.empty();
  while (!all && !end.passed()) {
    if (MPI_Testall(int(requests.size()), requests.data(), &all, MPI_STATUSES_IGNORE) != MPI_SUCCESS) {
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

bool MpiHeart::part() {
  if (peers_.empty()) return true;
  parting_ = true;
  SilenceWatch watch(world_.life(), world_.rank(), kDefaultSilence, "the end of the job");
  std::vector<SilenceWatch::Peer> missing;
  while (!parted_) {
    missing.clear();
    for (const auto& peer : peers_) {
      // A rank may be writing its last results, without a sign from its work: its beat is enough.
      if (!peer->has_gone) missing.push_back({peer->rank, true});
    }
    if (world_.life().broken()) return false;
    watch.check(missing, kPartingTime);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  thread_.join();
  return true;
}

}  // namespace certkv
