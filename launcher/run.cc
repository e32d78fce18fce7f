// certkv run: a batch of requests over all ranks, from input file to results folder.
#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <fstream>
#include <optional>
#include <thread>

#include "kernels/base/log.h"
#include "kvstore/http/status_server.h"
#include "launcher/commands.h"
#include "parallel/communicator.h"
#include "parallel/local_world.h"
#include "parallel/message_channel.h"
#include "parallel/mpi_session.h"
#include "parallel/rank_layout.h"
#include "parallel/topology.h"
#include "runtime/certify/head_class.h"
#include "runtime/engine_setup.h"
#include "runtime/job.h"
#include "runtime/manifest.h"
#include "runtime/options_io.h"
#include "runtime/signals.h"
#include "runtime/tokenizer.h"

namespace certkv {
namespace {

std::chrono::milliseconds milliseconds_of(double seconds) {
  return std::chrono::milliseconds(int64_t(seconds * 1000));
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  struct tm parts {};
  ::gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

// As a shell reads it back.
std::string quoted(const std::string& word) {
  const bool plain = !word.empty() && word.find_first_not_of(
                                          "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                          "0123456789_-./=:,+@%") == std::string::npos;
  if (plain) return word;
  std::string out = "'";
  for (char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

std::string command_line(const Args& args, int ranks, bool launched) {
  std::string text = launched ? fmt::format("mpirun -np {} certkv run", ranks) : "certkv run";
  for (const std::string& v : args.values) text += " " + quoted(v);
  return text;
}

std::string resume_command(const Args& args, int ranks, bool launched) {
  const bool has =
      std::find(args.values.begin(), args.values.end(), "--resume") != args.values.end() ||
      std::find(args.values.begin(), args.values.end(), "--run.resume") != args.values.end();
  return command_line(args, ranks, launched) + (has ? "" : " --resume");
}

BatchDefaults defaults_of(const JobOptions& job) {
  return {.sampling = job.sampling,
          .policy = job.policy,
          .tolerance = job.tolerance,
          .compare = !job.compare.empty()};
}

std::vector<int32_t> encode_line(const LoadedModel& model, const BatchLine& line) {
  std::vector<int32_t> ids;
  if (line.kind == BatchKind::Chat) {
    std::vector<ChatMessage> messages;
    for (const BatchMessage& m : line.messages) messages.push_back({m.role, m.content});
    ids = model.chat.encode(messages, *model.tokenizer);
  } else if (!line.prompt_ids.empty()) {
    ids = line.prompt_ids;
  } else {
    ids = model.tokenizer->encode(line.prompt, true);
  }
  const int64_t prompt = int64_t(ids.size());
  CERTKV_EXPECT(
      line.sampling.max_tokens <= model.token_limit - prompt, InvalidArgument,
      "the prompt has {} tokens; with max_tokens {} the limit of {} is passed: shorten "
      "the prompt or max_tokens, or raise model.max_len up to the model's own limit of {}",
      prompt, line.sampling.max_tokens, model.token_limit, model.config->max_tokens);
  return ids;
}

// Shapes of the requests that take most room, found without turning every line into tokens twice:
// the longest texts are, and among them the longest prompts are kept.
std::vector<RequestShape> largest_requests(const JobOptions& job, const LoadedModel& model) {
  constexpr size_t kCandidatesPerPlace = 4;
  struct Candidate {
    size_t bytes;
    BatchLine line;
  };
  const size_t places = size_t(job.run.max_batch);
  std::vector<Candidate> largest;  // a heap, the smallest first
  const auto smaller = [](const Candidate& a, const Candidate& b) { return a.bytes > b.bytes; };
  BatchReader reader(job.run.input, defaults_of(job));
  while (auto line = reader.next()) {
    if (line->bad) continue;
    size_t bytes = line->prompt.size() + 4 * line->prompt_ids.size();
    for (const BatchMessage& m : line->messages) bytes += m.content.size() + 64;
    bytes += size_t(std::min<int64_t>(line->sampling.max_tokens, model.token_limit));
    if (largest.size() == kCandidatesPerPlace * places) {
      if (bytes <= largest.front().bytes) continue;
      std::pop_heap(largest.begin(), largest.end(), smaller);
      largest.pop_back();
    }
    largest.push_back({bytes, std::move(*line)});
    std::push_heap(largest.begin(), largest.end(), smaller);
  }
  std::vector<RequestShape> shapes;
  const int forks = std::max(1, int(job.compare.size()));
  for (const Candidate& c : largest) {
    try {
      shapes.push_back(
          {int64_t(encode_line(model, c.line).size()), c.line.sampling.max_tokens, forks});
    } catch (const Error&) {  // it fails alone, when its turn comes
    }
  }
  std::sort(shapes.begin(), shapes.end(), [](const RequestShape& a, const RequestShape& b) {
    return a.prompt_tokens + a.max_tokens > b.prompt_tokens + b.max_tokens;
  });
  if (shapes.size() > places) shapes.resize(places);
  return shapes;
}

// Rank 0's shapes, on every rank.
std::vector<RequestShape> share_shapes(const std::vector<RequestShape>& mine, Communicator& world) {
  uint64_t count = mine.size();
  world.broadcast(view_u64(&count, 1), 0, {});
  world.wait(std::chrono::minutes(10));  // rank 0 reads the input meanwhile
  std::vector<uint64_t> words(3 * count + 1);
  for (size_t i = 0; i < mine.size() && world.rank() == 0; ++i) {
    words[3 * i] = uint64_t(mine[i].prompt_tokens);
    words[3 * i + 1] = uint64_t(mine[i].max_tokens);
    words[3 * i + 2] = uint64_t(mine[i].forks);
  }
  world.broadcast(view_u64(words.data(), words.size()), 0, {});
  world.wait();
  std::vector<RequestShape> shapes;
  for (size_t i = 0; i < count; ++i) {
    shapes.push_back({int64_t(words[3 * i]), int64_t(words[3 * i + 1]), int(words[3 * i + 2])});
  }
  return shapes;
}

// Processes of this node's ranks, so that a dying job can say which of them is gone.
struct LocalPeer {
  int rank = 0;
  uint64_t process = 0;
};

std::vector<LocalPeer> local_peers(Communicator& world, const Topology& topology) {
  uint64_t mine = uint64_t(::getpid());
  std::vector<uint64_t> all(size_t(world.size()), 0);
  world.all_gather(view_u64(&mine, 1), view_u64(all.data(), all.size()), {});
  world.wait();
  std::vector<LocalPeer> peers;
  for (int r = 0; r < world.size(); ++r) {
    if (r != world.rank() && topology.node_of_rank[size_t(r)] == topology.node) {
      peers.push_back({r, all[size_t(r)]});
    }
  }
  return peers;
}

// Gone, or dead and not yet buried by its launcher.
bool is_gone(uint64_t process) {
  std::ifstream stat(fmt::format("/proc/{}/stat", process));
  std::string text;
  if (!std::getline(stat, text)) return true;
  const size_t end = text.rfind(')');
  return end != std::string::npos && end + 2 < text.size() &&
         (text[end + 2] == 'Z' || text[end + 2] == 'X');
}

void name_lost_peers(const std::vector<LocalPeer>& peers) {
  for (const LocalPeer& p : peers) {
    if (is_gone(p.process)) log_error("rank {} (process {}) is lost", p.rank, p.process);
  }
}

struct Ranks {
  std::shared_ptr<MpiSession> session;
  std::shared_ptr<LocalWorld> local;
  std::unique_ptr<Communicator> world, group;
  std::unique_ptr<MessageChannel> leaders;
  RankLayout layout;
};

Ranks join_ranks(Args& args, const JobOptions& job, const MpiLaunch& launch) {
  Ranks r;
  if (!launch.by_launcher) {
    r.layout = plan_ranks(job.parallel.tensor, job.parallel.data, 1);
    r.local = LocalWorld::create(1);
    r.world = r.local->communicator(0);
    r.group = r.local->communicator(0);
    return r;
  }
  const auto late = [](const std::string& diagnosis) {
    if (!diagnosis.empty()) log_error("{}", diagnosis);
    // The first to end takes the job along: who has nothing to say lets the others speak.
    std::this_thread::sleep_for(std::chrono::seconds(diagnosis.empty() ? 3 : 1));
    ::_exit(kExitStopped);  // MPI_Init cannot be called off
  };
  args.mpi = r.session =
      std::make_shared<MpiSession>(milliseconds_of(job.parallel.start_seconds), late);
  r.layout = plan_ranks(job.parallel.tensor, job.parallel.data, r.session->size());
  log_set_rank(r.session->rank());
  r.world = r.session->world();
  r.group = r.session->tensor_group(r.layout);
  if (r.layout.data > 1) r.leaders = r.session->leaders_channel(r.layout);
  r.world->set_silence(milliseconds_of(job.parallel.deadline_seconds));
  r.group->set_silence(milliseconds_of(job.parallel.deadline_seconds));
  return r;
}

LogLevel log_level_of(const std::string& name) {
  if (name == "debug") return LogLevel::Debug;
  if (name == "warning") return LogLevel::Warning;
  if (name == "error") return LogLevel::Error;
  return LogLevel::Info;
}

void say_how_to_go_on(const std::string& resume) {
  fmt::print(stderr, "certkv: stopped; finished lines are kept. To continue:\n  {}\n", resume);
  std::fflush(stderr);
}

}  // namespace

int run_command(Args& args) {
  JobOptions job;
  OptionTable table(job);
  const auto parsed = table.read_arguments(args.values);
  if (parsed.help) {
    fmt::print("usage: [mpirun -np N] certkv run --config FILE [--key value ...]\n\n{}",
               table.help());
    return kExitDone;
  }
  log_set_level(log_level_of(job.log_level));
  table.resolve_paths();
  CERTKV_EXPECT(!job.run.input.empty(), InvalidArgument,
                "run.input is not set: name the file of requests with --input");
  CERTKV_EXPECT(
      !(job.audit.sample > 0 && job.cache.layout == kClassesLayout), InvalidArgument,
      "audit.sample is above 0 and cache.layout is 'classes': an audit's records name one "
      "layout for all heads; set audit.sample to 0, or name a layout");
  const MpiLaunch launch = detect_mpi_launch();
  // What is wrong with the configuration is found before the ranks meet.
  const int world = launch.by_launcher ? launch.size : 1;
  const int tensor = world > 0 ? plan_ranks(job.parallel.tensor, job.parallel.data, world).tensor
                               : job.parallel.tensor;
  const LoadedModel model = load_model(job, tensor);

  Ranks ranks = join_ranks(args, job, launch);
  const int rank = ranks.world->rank();
  const Topology topology =
      gather_topology(*ranks.world, milliseconds_of(job.parallel.deadline_seconds));
  const std::string resume = resume_command(args, ranks.world->size(), launch.by_launcher);

  std::shared_ptr<JobMonitor> monitor;
  std::unique_ptr<StatusThread> http;
  if (rank == 0 && !job.http.listen.empty()) {
    monitor = std::make_shared<JobMonitor>(fmt::format("rank 0 of {}", ranks.world->size()),
                                           CERTKV_VERSION, job.tolerance);
    http = std::make_unique<StatusThread>(HttpOptions{.listen = job.http.listen},
                                          [monitor] { return monitor->report(); });
    log_info("http: status at {}", http->url());
  }

  // Rank 0 alone reads and writes. What is wrong with input or output is found before the weights
  // are loaded.
  std::unique_ptr<BatchReader> reader;
  std::unique_ptr<JobOutput> output;
  std::vector<RequestShape> shapes;
  if (rank == 0) {
    reader = std::make_unique<BatchReader>(job.run.input, defaults_of(job));
    const BatchSurvey survey = reader->survey();
    CERTKV_EXPECT(survey.lines > 0, InvalidArgument, "{}: the input has no requests",
                  job.run.input);
    JobOutputOptions o;
    o.folder = job.run.output;
    o.resume = job.run.resume;
    o.policies = job.compare.empty() ? std::vector<Policy>{job.policy} : job.compare;
    o.compare = !job.compare.empty();
    o.tolerance = job.tolerance;
    o.tier1_digest = tier1_digest_name(job.cache);
    o.replicas = ranks.layout.data;
    o.options_echo = table.echo_json();
    o.session = {.name = fmt::format("{}-{}", utc_now(), ::getpid()),
                 .started = utc_now(),
                 .host = host_name(),
                 .ranks = ranks.world->size(),
                 .tensor = ranks.layout.tensor,
                 .data = ranks.layout.data,
                 .command = command_line(args, ranks.world->size(), launch.by_launcher),
                 .audit_sample = job.audit.sample,
                 .audit_folder = audit_folder(job)};
    o.terminal = ::isatty(2) != 0;
    o.progress_seconds = job.run.progress_seconds;
    o.monitor = monitor;
    output = std::make_unique<JobOutput>(
        std::move(o), identify_job(job, survey, digest_model_files(job.model.path)), survey);
    if (job.store.mode == "auto" && job.store.arena == "auto") {
      shapes = largest_requests(job, model);
    }
  }
  shapes = share_shapes(shapes, *ranks.world);

  const std::vector<LocalPeer> peers = local_peers(*ranks.world, topology);
  StopSignals signals({
      .on_signal =
          [&](int signal) {
            log_warning("{}: stopping after this step", signal_name(signal));
            name_lost_peers(peers);
          },
      .on_overdue =
          [&](int) {
            if (rank != 0) return;  // rank 0 ends the job for all
            output->flush_now(std::chrono::milliseconds(150));
            say_how_to_go_on(resume);
            if (ranks.session != nullptr) ranks.session->abort(kExitStopped);
            ::_exit(kExitStopped);
          },
  });

  const EngineSetup setup = set_up_engine(
      job, model, *ranks.world, *ranks.group, topology,
      arena_demand(job, *model.config, ranks.layout.tensor, topology.local_size, shapes),
      [&] { return ranks.session->tensor_group(ranks.layout); });
  if (!ranks.layout.is_leader(rank)) {
    run_follower(*setup.engine);
    return kExitDone;
  }
  const JobRank me{.engine = *setup.engine,
                   .channel = ranks.leaders.get(),
                   .replica = ranks.layout.replica(rank),
                   .replicas = ranks.layout.data,
                   .max_batch = job.run.max_batch,
                   .stop = [&] { return signals.stop() && signals.settled(); },
                   .alive = [&] { ranks.group->alive(); },
                   .on_error =
                       [&] {
                         while (!signals.settled()) ::pause();  // the other thread ends the process
                       }};
  if (rank != 0) {
    run_replica(me);
    return kExitDone;
  }
  int code = kExitOther;
  if (monitor) monitor->set_ready();
  try {
    code = run_job(
        me, {*reader, [&](const BatchLine& l) { return encode_line(model, l); }, job.compare},
        *output);
  } catch (const Error& e) {
    if (exit_code_of(e.kind()) == kExitStopped) say_how_to_go_on(resume);
    throw;
  }
  if (code == kExitStopped) say_how_to_go_on(resume);
  return code;
}

}  // namespace certkv
