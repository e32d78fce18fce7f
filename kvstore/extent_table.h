// Which bytes of the arena belong to whom: the store's own, private account.
//
// Freed space is dirty until it has been zeroed, and is given out only after that, so no owner ever
// sees what another one kept. Pure bookkeeping: the caller does the zeroing.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "kvstore/control.h"

namespace certkv {

struct Piece {
  uint64_t offset = 0, bytes = 0;
};

class ExtentTable {
 public:
  using Clock = std::chrono::steady_clock;
  // Zeroes a piece of the arena; called while an allocation needs dirty space.
  using Zero = std::function<void(Piece)>;

  // Manages [offset, offset + bytes), both multiples of kArenaGranule.
  ExtentTable(uint64_t offset, uint64_t bytes, Zero zero);

  struct Reservation {
    uint32_t version = 0;
    uint64_t run_bytes = 0;
    std::vector<uint64_t> offsets;  // of the runs, layer-major
  };

  // REQUIRES allocation_defect(request) to be empty. Nothing where the space cannot be had, not
  // even from orphans whose grace is over. One contiguous piece if there is one, else run by run.
  std::optional<Reservation> allocate(uint64_t session, const AllocateRequest& request);

  struct Adoption {
    uint32_t version = 0;
    uint64_t fence = 0, run_bytes = 0;  // run_bytes: of the part asked for
    std::vector<uint64_t> offsets;      // of the part's runs, layer-major
  };
  // The session becomes one more holder of the newest reservation that the request describes (see
  // AdoptRequest); it stays until the last holder is gone. Nothing where there is none.
  // REQUIRES allocation_defect(request.ranges) to be empty.
  std::optional<Adoption> adopt(uint64_t session, const AdoptRequest& request);

  // Gives back one hold of the session. With the last hold the space is freed, or, where any holder
  // wanted it kept and its owner can be asked for, becomes an orphan that the first need of room
  // evicts. False where the session holds no reservation of this version.
  bool release(uint64_t session, uint32_t version, bool keep = false);

  // The session ended in good order: what it alone held is freed at once if private; space of
  // owners that can be asked for becomes an orphan.
  void release_session(uint64_t session, Clock::time_point now);

  // The session's rank died: what it alone held becomes orphans, kept while nobody needs the room,
  // and in any case for `grace`, so that a relaunch can still find them.
  void orphan_session(uint64_t session, Clock::time_point now);
  void set_grace(Clock::duration grace) { grace_ = grace; }

  // Zeroes up to `bytes` of dirty space; true while some is left.
  bool scrub(uint64_t bytes);

  // What is held, by version, from the first above `after` on, until `visit` gives false.
  struct Listed {
    uint32_t version = 0;
    uint64_t fence = 0;
    bool orphan = false;
    const AllocateRequest& request;
    const std::vector<uint64_t>& offsets;  // of its runs
  };
  void list(uint32_t after, const std::function<bool(const Listed&)>& visit) const;

  uint64_t total_bytes() const { return total_; }
  uint64_t free_bytes() const { return free_bytes_; }  // dirty included
  uint64_t largest_bytes() const;                      // contiguous; dirty space counted apart
  uint64_t dirty_bytes() const;
  size_t reservations() const { return held_.size(); }
  size_t orphans() const;
  uint64_t bytes_of(uint64_t session) const;

 private:
  struct Held {
    uint64_t fence = 0;                    // session that reserved it
    std::map<uint64_t, uint64_t> holders;  // session -> how often; none: an orphan
    AllocateRequest request;
    std::vector<uint64_t> offsets;  // of its runs
    bool keep = false;              // as an orphan, when the last holder gives it back
    bool spared = false;            // an orphan that is kept for the grace
    Clock::time_point orphaned;
    bool content() const { return request.owner.is_content(); }
    bool orphan() const { return holders.empty(); }
    std::vector<Piece> pieces;
    uint64_t bytes = 0;
  };
  bool place(uint64_t bytes, std::vector<Piece>& out);
  bool place_all(uint64_t run_bytes, uint64_t runs, std::vector<Piece>& out);
  void give_back_clean(Piece piece);
  void free_held(std::map<uint32_t, Held>::iterator it);
  void make_orphan(Held& held, bool spared, Clock::time_point now);
  bool evict_one(Clock::time_point now);

  uint64_t total_;
  uint64_t free_bytes_;
  std::map<uint64_t, uint64_t> clean_;  // offset -> bytes, coalesced
  std::deque<Piece> dirty_;
  std::map<uint32_t, Held> held_;                   // by version
  std::map<OwnerId, std::set<uint32_t>> versions_;  // of owners that can be asked for
  uint32_t next_version_ = 1;
  Clock::duration grace_{};
  Zero zero_;
};

}  // namespace certkv
