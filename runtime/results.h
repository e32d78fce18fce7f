// results.jsonl: the journal's results in the order of the input, as far as they are complete.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/journal.h"
#include "runtime/options.h"

namespace certkv {

// Where the result of every finished line lies. One slot per policy of `compare`, else one.
class ResultsIndex {
 public:
  // slots: names of the policies under which each line is answered; {""} for a single result file.
  explicit ResultsIndex(size_t slots) : done_(slots) {}

  struct Place {
    size_t journal = 0;  // index into the paths given to write_results
    JournalPosition where;
  };

  // False, and nothing is changed, if the line was finished before in this slot.
  bool add(size_t slot, uint64_t line, Place place) {
    return done_[slot].try_emplace(line, place).second;
  }
  bool has(size_t slot, uint64_t line) const { return done_[slot].count(line) != 0; }
  uint64_t finished(size_t slot) const { return done_[slot].size(); }
  const std::map<uint64_t, Place>& slot(size_t s) const { return done_[s]; }
  size_t slots() const { return done_.size(); }

 private:
  std::vector<std::map<uint64_t, Place>> done_;
};

// Writes `path` atomically: the results of lines 0, 1, 2, ... of one slot up to the first that is
// not finished. Returns the number of lines written.
uint64_t write_results(const std::string& path, const ResultsIndex& index, size_t slot,
                       const std::vector<std::string>& journal_paths);

// results.jsonl, or results-<policy>.jsonl for each policy of `compare`.
std::vector<std::string> result_file_names(const std::vector<Policy>& compare);

}  // namespace certkv
