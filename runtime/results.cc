#include "runtime/results.h"

#include "runtime/output_file.h"

namespace certkv {

uint64_t write_results(const std::string& path, const ResultsIndex& index, size_t slot,
                       const std::vector<std::string>& journal_paths) {
  std::vector<std::unique_ptr<JournalResults>> journals(journal_paths.size());
  AtomicFile file(path);
  uint64_t next = 0;
  for (const auto& [line, place] : index.slot(slot)) {
    if (line != next) break;
    ++next;
    auto& journal = journals.at(place.journal);
    if (!journal) journal = std::make_unique<JournalResults>(journal_paths[place.journal]);
    file.write(journal->read(place.where) + "\n");
  }
  file.commit();
  return next;
}

std::vector<std::string> result_file_names(const std::vector<Policy>& compare) {
  if (compare.empty()) return {"results.jsonl"};
  std::vector<std::string> names;
  for (Policy p : compare) names.push_back(std::string("results-") + policy_name(p) + ".jsonl");
  return names;
}

}  // namespace certkv
