// Ranks that fail on purpose; mpi_faults_test.sh runs it under mpirun and judges what it prints.
//   mpi_fault_ranks SCENARIO
// Rank 1 is the one that fails. A survivor that saw the error it should prints "SAW <rank>: <text>".
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/base/error.h"
#include "parallel/mpi_session.h"

namespace certkv {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kSilence{1000};

void say(const char* what, int rank, const std::string& text) {
  std::printf("%s %d: %s\n", what, rank, text.c_str());
  std::fflush(stdout);
}

// `witness` is false for a rank that only comes back because mpirun wakes the ranks that it ends
// (SIGCONT before SIGTERM): whether it gets to see anything before it dies is a matter of luck.
template <typename F>
void expect_error(int rank, F&& f, bool witness = true) {
  const auto start = std::chrono::steady_clock::now();
  try {
    f();
    say(witness ? "NOTHING" : "WOKEN", rank, "no error");
  } catch (const Error& error) {
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    say(witness ? "SAW" : "WOKEN", rank, fmt::format("{} after {:.1f} s: {}", error_kind_name(error.kind()), s, error.what()));
  }
}

// The survivors have said what they saw when rank 0 ends the job.
[[noreturn]] void end(MpiSession& session) {
  if (session.rank() == 0) {
    std::this_thread::sleep_for(2 * kSilence);
    session.abort(4);
  }
  while (true) pause();
}

int run(const std::string& scenario) {
  MpiSession session;
  const int rank = session.rank();
  const auto world = session.world();
  const auto channel = session.channel();
  std::vector<uint64_t> pids(size_t(session.size()));
  uint64_t pid = uint64_t(getpid());
  world->all_gather(view_u64(&pid, 1), view_u64(pids.data(), pids.size()), {});
  world->wait(kSilence);
  const bool culprit = rank == 1;
  std::vector<float> x(100000, 1.0f);
  const auto reduce = [&] {
    world->all_reduce_sum(view_f32(x.data(), x.size()), {});
    world->wait(kSilence);
  };

  if (scenario == "stop") {
    if (culprit) raise(SIGSTOP);
    expect_error(rank, reduce, !culprit);
    end(session);
  }
  if (scenario == "stop-waiting") {  // the others know that rank 1 has come, but not that it stopped
    if (rank == 0) {
      for (int i = 0; i < 400; ++i) {
        std::this_thread::sleep_for(milliseconds(10));
        world->alive();
      }
    }
    std::thread stopper;
    if (culprit) {
      stopper = std::thread([] {
        std::this_thread::sleep_for(milliseconds(500));
        kill(getpid(), SIGSTOP);
      });
    }
    expect_error(rank, reduce, !culprit);
    end(session);
  }
  if (scenario == "hang") {  // the process lives, its work does not
    if (culprit) std::this_thread::sleep_for(std::chrono::hours(1));
    expect_error(rank, reduce);
    end(session);
  }
  if (scenario == "kill") {
    if (culprit) raise(SIGKILL);
    reduce();
    say("NOTHING", rank, "no error");
    return 0;
  }
  if (scenario == "leave") {  // ends without a word: mpirun ends the others
    if (culprit) _exit(0);
    reduce();
    say("NOTHING", rank, "no error");
    return 0;
  }
  if (scenario == "abort") {
    if (culprit) {
      world->abort("its scratch cache is on fire");
      end(session);
    }
    expect_error(rank, reduce);
    end(session);
  }
  if (scenario == "receive") {
    if (culprit) raise(SIGSTOP);
    expect_error(rank, [&] { channel->receive(1, kSilence); }, !culprit);
    end(session);
  }
  if (scenario == "pause") {  // shorter than the limit: nobody may notice
    if (culprit) raise(SIGSTOP);
    if (rank == 0) {
      std::this_thread::sleep_for(kSilence / 2);
      kill(pid_t(pids[1]), SIGCONT);
    }
    reduce();
    if (x.back() == float(session.size())) say("SAW", rank, "the sum");
    return session.finish() ? 0 : 5;
  }
  if (scenario == "work") {  // until somebody ends it
    say("SAW", rank, "work");
    while (true) {
      std::this_thread::sleep_for(milliseconds(20));
      reduce();
    }
  }
  if (scenario == "resume") {  // comes back after the others have given up
    if (culprit) raise(SIGSTOP);
    expect_error(rank, reduce);
    if (rank == 0) kill(pid_t(pids[1]), SIGCONT);
    end(session);
  }
  std::fprintf(stderr, "unknown scenario %s\n", scenario.c_str());
  return 2;
}

}  // namespace
}  // namespace certkv

int main(int argc, char** argv) { return certkv::run(argc > 1 ? argv[1] : ""); }
