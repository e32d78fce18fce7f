// certkv doctor: what this machine has, and whether a configuration fits it.
#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "kernels/attend.h"
#include "kernels/base/failpoint.h"
#include "launcher/commands.h"
#include "launcher/doctor_gpu.h"
#include "launcher/machine.h"
#include "parallel/installed_libraries.h"
#include "runtime/byte_size.h"
#include "runtime/footprint.h"
#include "runtime/options_io.h"

namespace certkv {

namespace {

using Json = nlohmann::ordered_json;

// One report, printed for people or as JSON {section: {name: value}}.
class Report {
 public:
  void section(std::string title) { sections_.push_back({std::move(title), {}}); }
  void line(std::string name, Json value, std::string text) {
    sections_.back().lines.push_back({std::move(name), std::move(value), std::move(text)});
  }
  void words(std::string name, const std::string& text) { line(std::move(name), text, text); }
  void bytes(std::string name, uint64_t value) {
    line(std::move(name) + "_bytes", value, byte_size_text(value));
  }
  void limit(std::string name, uint64_t value, bool is_bytes) {
    const bool unlimited = value == std::numeric_limits<uint64_t>::max();
    line(std::move(name) + (is_bytes ? "_bytes" : ""), unlimited ? Json(nullptr) : Json(value),
         unlimited  ? "unlimited"
         : is_bytes ? byte_size_text(value)
                    : fmt::format("{}", value));
  }

  std::string text() const {
    std::string out;
    for (const Section& section : sections_) {
      out += section.title + "\n";
      for (const Line& l : section.lines) out += fmt::format("  {:<24} {}\n", l.name, l.text);
    }
    return out;
  }
  std::string json() const {
    Json out = Json::object();
    for (const Section& section : sections_) {
      for (const Line& l : section.lines) out[section.title][l.name] = l.value;
    }
    return out.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  }

 private:
  struct Line {
    std::string name;
    Json value;
    std::string text;
  };
  struct Section {
    std::string title;
    std::vector<Line> lines;
  };
  std::vector<Section> sections_;
};

// ---- the machine --------------------------------------------------------------------------------

void report_machine(const Machine& m, Report& report) {
  report.section("machine");
  report.words("host", m.host);
  report.words("system", m.system);
  report.words("cpu", m.cpu);
  report.line("cpu_features", m.features,
              m.features.empty() ? "none known" : fmt::format("{}", fmt::join(m.features, " ")));
  report.words("attention", attend_isa());
  report.line("cores", m.cores_usable,
              fmt::format("{} usable of {} online", m.cores_usable, m.cores_online));
  report.bytes("memory", m.memory_bytes);
  report.bytes("memory_available", m.memory_available_bytes);
  report.section("limits");
  report.line("dev_shm_bytes", m.shm_bytes,
              m.shm_bytes == 0 ? "none: MPI and UCX need it between ranks of a node"
                               : fmt::format("{}, {} free", byte_size_text(m.shm_bytes),
                                             byte_size_text(m.shm_free_bytes)));
  report.limit("memlock", m.memlock_bytes, true);
  report.limit("open_files", m.open_files, false);
  report.limit("address_space", m.address_space_bytes, true);
}

std::string openblas_version() {
  // Not in cblas.h of every distribution; the program is linked with it.
  auto* config = reinterpret_cast<char* (*)()>(dlsym(RTLD_DEFAULT, "openblas_get_config"));
  return config == nullptr ? "linked, version unknown" : config();
}

void report_libraries(Report& report) {
  report.section("libraries");
  report.words("certkv", CERTKV_VERSION);
  report.words("mpi", mpi_library_version());
  report.words("ucx", ucx_library_version());
  std::map<std::string, std::vector<std::string>> devices;
  for (const UcxTransport& t : ucx_transports()) devices[t.transport].push_back(t.device);
  std::vector<std::string> transports;
  for (const auto& [name, list] : devices) {
    transports.push_back(fmt::format("{} ({})", name, fmt::join(list, ", ")));
  }
  report.line("ucx_transports", devices,
              transports.empty() ? "none" : fmt::format("{}", fmt::join(transports, ", ")));
  report.words("openblas", openblas_version());
}

void report_gpu_side(Report& report) {
  report.section("gpu");
  for (GpuLine& l : gpu_lines(inspect_gpu_side())) {
    report.line(std::move(l.name), std::move(l.value), std::move(l.text));
  }
}

// ---- a configuration ----------------------------------------------------------------------------

struct DoctorKeys {
  bool json = false;
  bool failpoints = false;
  int64_t context = 0;
  int64_t ranks_per_node = 0;
};

// What does not fit and what to change, one sentence each; empty: it fits.
std::vector<std::string> verdict(const ModelConfig& model, const JobOptions& options,
                                 const FootprintQuestion& question, const Footprint& need,
                                 uint64_t available) {
  std::vector<std::string> wrong;
  if (need.node() > available) {
    const int64_t batch = largest_batch(model, options, question, available);
    std::string change;
    if (batch >= 1) {
      change = fmt::format("set run.max_batch to {} or less, or use more nodes", batch);
    } else if (const int64_t context = longest_context(model, options, question, available);
               context > 0) {
      change = fmt::format(
          "set run.max_batch to 1 and model.max_len to {} or less, or use more nodes", context);
    } else {
      change = "use more nodes (parallel.tensor) or a smaller model";
    }
    wrong.push_back(fmt::format("the node needs {} and {} are available; {}",
                                byte_size_text(need.node()), byte_size_text(available), change));
  }
  const auto check = [&](const char* key, const std::string& text, uint64_t needed) {
    if (text == "auto") return;
    const uint64_t given = parse_byte_size(text).value_or(0);
    if (given < needed) {
      wrong.push_back(
          fmt::format("{} is {}, and {} are needed; raise it, or lower run.max_batch or "
                      "model.max_len",
                      key, text, byte_size_text(needed)));
    }
  };
  check("run.tier1_memory", options.run.tier1_memory, need.tier1);
  check("store.arena", options.store.arena, need.tier2);
  return wrong;
}

// Returns whether it fits.
bool report_configuration(const JobOptions& options, const DoctorKeys& keys, uint64_t available,
                          Report& report) {
  const ModelConfig model = load_model_config(options.model.path);
  FootprintQuestion question;
  question.tensor = options.parallel.tensor == 0 ? 1 : options.parallel.tensor;
  question.ranks_on_node =
      keys.ranks_per_node == 0 ? question.tensor * options.parallel.data : keys.ranks_per_node;
  question.context = keys.context != 0            ? keys.context
                     : options.model.max_len != 0 ? options.model.max_len
                                                  : model.max_tokens;
  question.batch = options.run.max_batch;
  const Footprint need = footprint(model, options, question);

  report.section("configuration");
  report.words("model", options.model.path);
  report.line("context_tokens", question.context, fmt::format("{}", question.context));
  report.line("batch", question.batch, fmt::format("{} sequences per replica", question.batch));
  report.line("ranks_per_node", question.ranks_on_node,
              fmt::format("{} (tensor {}, data {})", question.ranks_on_node, question.tensor,
                          options.parallel.data));
  report.line("tier1_bytes_per_token", need.tier1_token_bytes,
              fmt::format("{:.1f} per KV head, of {} unquantised ({})", need.tier1_token_bytes,
                          4 * model.head_dim, options.cache.layout));
  const std::string watch = tier1_digest_name(options.cache);
  report.line("tier1_digest", watch,
              options.cache.scrub_steps == 0
                  ? watch + " (damaged pages go unnoticed)"
                  : fmt::format("{} (every page verified within {} steps)", watch,
                                options.cache.scrub_steps));
  report.section("each rank needs");
  report.bytes("weights", need.weights);
  report.line("tier1_bytes", need.tier1,
              fmt::format("{}, of {} unquantised", byte_size_text(need.tier1),
                          byte_size_text(need.dense_kv)));
  report.bytes("scratch", need.scratch);
  report.bytes("prefill", need.prefill);
  report.bytes("rank", need.rank());
  report.section("each node needs");
  report.line(
      "ranks_bytes", need.node() - need.tier2,
      fmt::format("{} for {} ranks", byte_size_text(need.node() - need.tier2), need.ranks_on_node));
  report.bytes("tier2", need.tier2);
  report.bytes("node", need.node());
  report.bytes("available", available);

  const std::vector<std::string> wrong = verdict(model, options, question, need, available);
  report.section("verdict");
  report.line("fits", wrong.empty(), wrong.empty() ? "OK" : "does not fit");
  if (!wrong.empty()) report.line("change", wrong, fmt::format("{}", fmt::join(wrong, "; ")));
  return wrong.empty();
}

// Name, what can be asked there, what must hold: with tabs between them.
int list_failpoints() {
#if CERTKV_FAILPOINTS
  for (const failpoint::Row& row : failpoint::table())
    fmt::print("{}\t{}\t{}\n", row.name, row.actions, row.holds);
  return kExitDone;
#else
  fmt::print(stderr, "this build has no failpoints: configure with -DCERTKV_FAILPOINTS=ON\n");
  return kExitNo;
#endif
}

}  // namespace

int doctor_command(Args& args) {
  DoctorKeys keys;
  JobOptions options;
  OptionTable table(options);
  table.add("json", &keys.json, {.meaning = "print JSON instead of text"});
  table.add("failpoints", &keys.failpoints,
            {.meaning = "only list the named places where a fault can be asked for, one a line"});
  table.add("context", &keys.context,
            {.meaning = "of every sequence; 0: model.max_len, or the model's limit",
             .unit = "tokens",
             .cost = "more memory",
             .min = 0,
             .max = kMaxTokens});
  table.add("ranks_per_node", &keys.ranks_per_node,
            {.meaning = "ranks that share a node; 0: all of them",
             .unit = "ranks",
             .cost = "more memory per node",
             .min = 0,
             .max = 4096});
  if (table.read_arguments(args.values).help) {
    fmt::print(
        "usage: certkv doctor [--config FILE] [--json] [--key value ...]\n\nSays what this "
        "machine has and, where a model is given, what the job needs. Exit code 0: it fits, "
        "3: it does not.\n\n{}",
        table.help());
    return kExitDone;
  }
  if (keys.failpoints) return list_failpoints();
  table.resolve_paths();
  const Machine machine = inspect_machine();
  Report report;
  report_machine(machine, report);
  report_libraries(report);
  report_gpu_side(report);
  bool fits = true;
  if (!options.model.path.empty()) {
    fits = report_configuration(options, keys, machine.memory_available_bytes, report);
  }
  fmt::print("{}", keys.json ? report.json() : report.text());
  return fits ? kExitDone : kExitNo;
}

}  // namespace certkv
