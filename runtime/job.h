// A job: the lines of the input through the engines of all replicas to the results.
//
//   rank 0              run_job: reads, deals out, answers with its own replica, writes
//   other leaders       run_replica: answers what it is dealt, until told that there is no more
//   all other ranks     run_follower: steps along with its leader
//
// Replicas never wait for each other: each has a few requests in stock. One that is done with its
// stock gets more as soon as rank 0 is between two of its own steps.
//
// THREADS: one per rank; `stop` is asked between steps.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runtime/batch_io.h"
#include "runtime/engine.h"
#include "runtime/job_output.h"

namespace certkv {

class MessageChannel;

// A rank's means. References outlive the call.
struct JobRank {
  Engine& engine;
  MessageChannel* channel = nullptr;  // of the leaders, ranked by replica; null for one replica
  int replica = 0, replicas = 1;
  int64_t max_batch = 8;             // requests in stock per replica: twice as many
  std::function<bool()> stop = {};   // asked between steps; stays true
  std::function<void()> alive = {};  // sign of life while a leader waits for work
  // Before anything is written because of an error. Does not return where another thread already
  // ends the process.
  std::function<void()> on_error = {};
};

struct JobInput {
  BatchReader& reader;  // surveyed
  // Token ids of a line. Throws InvalidArgument or BadFile, which fails the line.
  std::function<std::vector<int32_t>(const BatchLine&)> encode;
  std::vector<Policy> compare;  // of the job
};

// Returns the exit code of the job, as far as its lines decide it: 0, 3, or 4 when it was stopped.
// Everything is written when it returns. When it throws (peer or store lost, disk full), what is
// finished is in the journal, and results and summary have been written if the disk allows it.
int run_job(const JobRank& rank, JobInput input, JobOutput& output);

void run_replica(const JobRank& rank);
void run_follower(Engine& engine);

}  // namespace certkv
