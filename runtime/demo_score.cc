#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "runtime/demo_batch.h"
#include "runtime/json_file.h"
#include "runtime/line_reader.h"
#include "runtime/record_json.h"

namespace certkv {
namespace {

using nlohmann::json;

void for_each_line(const std::string& path, const std::function<void(const json&)>& visit) {
  struct File {
    int fd;
    ~File() {
      if (fd >= 0) ::close(fd);
    }
  } file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  CERTKV_EXPECT(file.fd >= 0, BadFile, "{}: {}", path, std::strerror(errno));
  LineReader lines(file.fd, path, size_t(64) << 20);
  LineReader::Line line;
  while (lines.next(line)) {
    visit(parse_json(line.text, fmt::format("{}:{}", path, line.number)));
  }
}

std::string text_of(const json& result) {
  const json& response = result.at("response");
  if (response.is_null()) return "";
  const json& choice = response.at("body").at("choices").at(0);
  return choice.contains("text") ? choice.at("text") : choice.at("message").at("content");
}

std::string figure(const json& v) {
  return v.is_null() ? "none" : upper_text(v.get<double>());
}

}  // namespace

bool answer_is_right(const std::string& text, const std::string& expected) {
  const std::string answer = text.substr(0, text.find_first_of(".\n"));
  const size_t from = answer.find_first_not_of(' ');
  if (from == std::string::npos) return expected.empty();
  return answer.substr(from, answer.find_last_not_of(' ') + 1 - from) == expected;
}

DemoScore score_results(const std::string& results_path, const std::string& answers_path) {
  std::map<std::string, std::string> answers;
  try {
    for_each_line(results_path, [&](const json& v) {
      answers[v.at("custom_id").get<std::string>()] = text_of(v);
    });
    DemoScore score;
    for_each_line(answers_path, [&](const json& v) {
      const std::string id = v.at("custom_id");
      const auto at = answers.find(id);
      ++score.questions;
      if (at != answers.end() && answer_is_right(at->second, v.at("expected"))) {
        ++score.right;
      } else {
        score.wrong.push_back(id);
      }
    });
    return score;
  } catch (const json::exception& e) {
    CERTKV_THROW(BadFile, "{} with {}: {}", results_path, answers_path, e.what());
  }
}

std::string demo_table(const std::string& run_folder, const std::string& answers_path) {
  const json summary = load_json_file(run_folder + "/summary.json");
  std::string table = fmt::format(
      "{:<8} {:>9} {:>10} {:>9} {:>12}  {}\n", "policy", "right", "tokens/s", "KV bytes",
      "worst bound", "head-steps per rung 0-4, in % (certified / exact / over / failed)");
  try {
    json order = summary.at("compare");
    const bool compare = !order.empty();
    if (!compare) order = json::array({summary.at("policy")});
    for (const json& name : order) {
      const std::string policy = name;
      const json& p = compare ? summary.at("policies").at(policy) : summary;
      const DemoScore score =
          score_results(run_folder + (compare ? "/results-" + policy + ".jsonl" : "/results.jsonl"),
                        answers_path);
      const double dense = p.at("dense_bytes").get<double>();
      const double steps = p.at("head_steps").get<double>();
      std::string rungs;
      for (int r = 0; r < 5; ++r) {
        const double n = p.at("rungs").at(std::to_string(r)).get<double>();
        rungs += fmt::format("{:.2f} ", steps > 0 ? 100 * n / steps : 0);
      }
      const std::string bytes =
          dense > 0 ? fmt::format("{:.3f}x", p.at("tier1_bytes").get<double>() / dense) : "none";
      table += fmt::format(
          "{:<8} {:>9} {:>10.1f} {:>9} {:>12}  {}({} / {} / {} / {})\n", policy,
          fmt::format("{}/{}", score.right, score.questions),
          p.at("tokens_per_second").is_null() ? 0 : p.at("tokens_per_second").get<double>(), bytes,
          figure(p.at("returned").at("relative_max")), rungs, p.at("certified").get<uint64_t>(),
          p.at("exact").get<uint64_t>(), p.at("over").get<uint64_t>(),
          p.at("failed").get<uint64_t>());
    }
  } catch (const json::exception& e) {
    CERTKV_THROW(BadFile, "{}/summary.json: {}", run_folder, e.what());
  }
  return table;
}

}  // namespace certkv
