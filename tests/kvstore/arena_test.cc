#include "kvstore/arena.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "kernels/base/error.h"
#include "kvstore/extent_table.h"

namespace certkv {
namespace {

constexpr uint64_t kMiB = uint64_t(1) << 20;

template <typename Body>
std::string error_of(ErrorKind kind, Body body) {
  try {
    body();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), kind) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
}

TEST(Arena, AllItsMemoryIsThereFromTheStart) {
  const Arena arena = Arena::create(3 * kMiB + 1, 5);
  EXPECT_EQ(arena.bytes(), 3 * kMiB + 4096);
  struct stat st {};
  ASSERT_EQ(fstat(arena.fd(), &st), 0);
  EXPECT_GE(uint64_t(st.st_blocks) * 512, arena.bytes());
}

TEST(Arena, NobodyCanShrinkOrGrowIt) {
  const Arena arena = Arena::create(kMiB, 5);
  EXPECT_NE(ftruncate(arena.fd(), 4096), 0);
  EXPECT_NE(ftruncate(arena.fd(), off_t(2 * kMiB)), 0);
  EXPECT_NE(fcntl(arena.fd(), F_ADD_SEALS, F_SEAL_WRITE), 0);
}

TEST(Arena, MoreThanTheMachineHasIsACleanErrorThatSaysWhatToDo) {
  const uint64_t too_much = (host_memory().available_bytes / 4096 + 1000) * 4096 * 2;
  const std::string text = error_of(ErrorKind::OutOfMemory, [&] { Arena::create(too_much, 5); });
  EXPECT_NE(text.find("store.arena"), std::string::npos) << text;
  EXPECT_NE(text.find("MiB"), std::string::npos) << text;
}

// In a child, since the limit would also bind the test's own output.
TEST(Arena, AFileSizeLimitIsACleanErrorAndNoSignal) {
  const pid_t pid = fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    const rlimit small{kMiB, kMiB};
    if (setrlimit(RLIMIT_FSIZE, &small) != 0) _exit(3);
    try {
      Arena::create(2 * kMiB, 5);
    } catch (const Error& e) {
      _exit(e.kind() == ErrorKind::OutOfMemory ? 0 : 1);
    }
    _exit(2);
  }
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(Arena, ASizeThatIsNoSizeIsRefused) {
  for (const uint64_t bytes : {uint64_t(0), uint64_t(4096), ~uint64_t(0), uint64_t(1) << 63}) {
    error_of(ErrorKind::InvalidArgument, [&] { Arena::create(bytes, 5); });
  }
  error_of(ErrorKind::InvalidArgument, [&] { Arena::create(kMiB, 0); });
}

TEST(Arena, TheReportOfProgressMayEndTheCreation) {
  error_of(ErrorKind::Stopped,
           [&] { Arena::create(kMiB, 5, [](uint64_t) { CERTKV_THROW(Stopped, "enough"); }); });
}

TEST(Arena, ViewsOutsideAreRefused) {
  const Arena arena = Arena::create(kMiB, 5);
  EXPECT_NE(arena.at(4096, kMiB - 4096), nullptr);
  const uint64_t top = ~uint64_t(0);
  for (const auto& [offset, length] :
       std::vector<std::pair<uint64_t, uint64_t>>{{0, 64},
                                                  {4032, 64},
                                                  {4096, kMiB},
                                                  {kMiB, 1},
                                                  {kMiB + 64, 0},
                                                  {4097, 64},
                                                  {top - 63, 64},
                                                  {top - 63, top},
                                                  {4096, top},
                                                  {8192, top - 8000}}) {
    error_of(ErrorKind::Corrupt, [&, o = offset, l = length] { arena.at(o, l); });
  }
}

TEST(Arena, AMappingSeesTheSameBytes) {
  const Arena arena = Arena::create(kMiB, 5);
  const Arena other = Arena::map(dup(arena.fd()), arena.bytes(), 5);
  *arena.at(8192, 1) = std::byte{42};
  EXPECT_EQ(*other.at(8192, 1), std::byte{42});
}

TEST(Arena, AForeignOrDamagedFileIsNotMapped) {
  const Arena arena = Arena::create(kMiB, 5);
  const auto refuse = [&](int fd, uint64_t bytes, uint64_t nonce) {
    error_of(ErrorKind::CommError, [&] { Arena::map(fd, bytes, nonce); });
  };
  refuse(dup(arena.fd()), kMiB, 6);      // another store's nonce
  refuse(dup(arena.fd()), 2 * kMiB, 5);  // a size that is not the file's
  refuse(dup(arena.fd()), kMiB - 4096, 5);
  refuse(dup(arena.fd()), 0, 5);
  const int plain = memfd_create("plain", MFD_CLOEXEC);  // not sealed: could be shrunk under us
  ASSERT_EQ(ftruncate(plain, off_t(kMiB)), 0);
  refuse(plain, kMiB, 5);
  // Every bit of the checked part of the header.
  auto* header = static_cast<unsigned char*>(
      mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, arena.fd(), 0));
  ASSERT_NE(header, MAP_FAILED);
  for (size_t bit = 0; bit < 64 * 8; ++bit) {
    header[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
    refuse(dup(arena.fd()), kMiB, 5);
    header[bit / 8] ^= static_cast<unsigned char>(1 << bit % 8);
  }
  munmap(header, 4096);
  Arena::map(dup(arena.fd()), kMiB, 5);  // and whole again, it is accepted
}

// ---- extents ------------------------------------------------------------------------------------

AllocateRequest request_of(uint32_t layers, uint32_t heads, uint32_t blocks,
                           OwnerId owner = {1, 2}) {
  return {owner, 0, layers, 0, heads, 0, blocks, uint16_t(DType::BF16), 16, 64, 0};
}

TEST(Extents, NeverOverlapAndAreZeroWhenGivenOut) {
  constexpr uint64_t kBytes = 2 * kMiB;
  std::vector<unsigned char> memory(kBytes + 4096, 0);
  ExtentTable table(4096, kBytes, [&](Piece p) {
    ASSERT_LE(p.offset + p.bytes, memory.size());
    std::fill_n(memory.begin() + std::ptrdiff_t(p.offset), p.bytes, 0);
  });
  std::mt19937 random(11);
  struct Live {
    uint64_t session;
    ExtentTable::Reservation r;
  };
  std::vector<Live> live;
  size_t given = 0, refused = 0;
  for (int turn = 0; turn < 3000; ++turn) {
    const uint64_t session = 1 + random() % 3;
    if (random() % 2 == 0) {
      const auto request = request_of(1 + random() % 4, 1 + random() % 2, 1 + random() % 12);
      auto got = table.allocate(session, request);
      if (!got) {
        ++refused;
        continue;
      }
      ++given;
      for (const uint64_t offset : got->offsets) {
        ASSERT_EQ(offset % 64, 0u);
        ASSERT_GE(offset, 4096u);
        ASSERT_LE(offset + got->run_bytes, memory.size());
        for (uint64_t i = offset; i < offset + got->run_bytes; ++i) {
          ASSERT_EQ(memory[i], 0) << "given out twice, or not zeroed, at " << i;
          memory[i] = 1;
        }
      }
      live.push_back({session, std::move(*got)});
    } else if (!live.empty()) {
      const size_t i = random() % live.size();
      ASSERT_FALSE(table.release(live[i].session + 1, live[i].r.version));
      ASSERT_TRUE(table.release(live[i].session, live[i].r.version));
      ASSERT_FALSE(table.release(live[i].session, live[i].r.version));
      live.erase(live.begin() + std::ptrdiff_t(i));
      if (random() % 4 == 0) table.scrub(100000);
    }
  }
  EXPECT_GT(given, 500u);
  EXPECT_GT(refused, 50u);
  for (const Live& l : live) table.release(l.session, l.r.version);
  while (table.scrub(kMiB)) {
  }
  EXPECT_EQ(table.free_bytes(), kBytes);
  EXPECT_EQ(table.largest_bytes(), kBytes) << "holes that touch must become one";
}

TEST(Extents, VersionsAreNeverUsedTwice) {
  ExtentTable table(4096, kMiB, [](Piece) {});
  std::set<uint32_t> seen;
  for (int i = 0; i < 1000; ++i) {
    const auto got = table.allocate(1, request_of(1, 1, 1));
    ASSERT_TRUE(got);
    EXPECT_TRUE(seen.insert(got->version).second);
    EXPECT_NE(got->version, 0u);
    ASSERT_TRUE(table.release(1, got->version));
  }
}

TEST(Extents, AFragmentedArenaStillServesRunByRun) {
  const uint64_t run = run_bytes(request_of(1, 1, 7));
  const uint64_t granules = (run + 4095) / 4096 * 4096;
  ExtentTable table(4096, 4 * granules, [](Piece) {});
  std::vector<uint32_t> versions;
  for (int i = 0; i < 4; ++i) versions.push_back(table.allocate(1, request_of(1, 1, 7))->version);
  table.release(1, versions[0]);
  table.release(1, versions[2]);
  const auto got = table.allocate(1, request_of(2, 1, 7));
  ASSERT_TRUE(got);
  EXPECT_EQ(std::max(got->offsets[0], got->offsets[1]) - std::min(got->offsets[0], got->offsets[1]),
            2 * granules);
  EXPECT_FALSE(table.allocate(1, request_of(1, 1, 1)));
}

TEST(Extents, AFailedAllocationTakesNothing) {
  ExtentTable table(4096, kMiB, [](Piece) {});
  const uint64_t before = table.free_bytes();
  EXPECT_FALSE(table.allocate(1, request_of(100, 8, 64)));
  EXPECT_FALSE(table.allocate(1, request_of(16384, 1, 1 << 24)));
  EXPECT_EQ(table.free_bytes(), before);
  EXPECT_EQ(table.largest_bytes(), before);
}

TEST(Extents, OrphansOutliveTheirGraceButNotTheNeedForRoom) {
  ExtentTable table(4096, kMiB, [](Piece) {});
  table.set_grace(std::chrono::seconds(2));
  const auto now = ExtentTable::Clock::now();
  const auto all = request_of(1, 1, 200);
  ASSERT_TRUE(table.allocate(1, all));
  table.orphan_session(1, now);
  EXPECT_EQ(table.orphans(), 1u);
  EXPECT_FALSE(table.allocate(2, all)) << "within its grace a dead rank's space is kept";
  table.set_grace(std::chrono::seconds(0));
  EXPECT_TRUE(table.allocate(2, all));
  EXPECT_EQ(table.orphans(), 0u);
}

TEST(Extents, AnOrderlyEndFreesPrivateSpaceAndKeepsSharedSpace) {
  ExtentTable table(4096, kMiB, [](Piece) {});
  table.set_grace(std::chrono::hours(1));
  const OwnerId shared{uint64_t(1) << 63, 5};
  ASSERT_TRUE(table.allocate(1, request_of(1, 1, 8)));
  ASSERT_TRUE(table.allocate(1, request_of(1, 1, 8, shared)));
  table.release_session(1, ExtentTable::Clock::now());
  EXPECT_EQ(table.reservations(), 1u);
  EXPECT_EQ(table.orphans(), 1u);
  EXPECT_EQ(table.bytes_of(1), 0u);
}

}  // namespace
}  // namespace certkv
