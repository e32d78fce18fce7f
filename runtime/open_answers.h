// The answers that are being generated, in files of their own: OUTPUT/open/LINE-POLICY.jsonl.
//
// Lines are framed as in the journal (runtime/journal.h): the header, then one line of news for
// each token as it is drawn, and now and then what the head-steps so far have added up to. Nothing
// waits for the disk: the files outlive killed processes, and of a machine that goes down the last
// tokens may be missing and are drawn again, to the same ones. A file goes when its line is
// finished.
//
// ERRORS: IoError where a file cannot be written (disk full); the job ends and can be resumed.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "runtime/answer_state.h"

namespace certkv {

class Journal;

class OpenAnswers {
 public:
  // Files of answers for which `finished` holds are removed: a job ended between the two.
  OpenAnswers(std::string folder, std::string job,
              const std::function<bool(uint64_t line, Policy policy)>& finished);
  ~OpenAnswers();

  // What earlier sessions have left of an answer; nothing where there is no sound beginning of it.
  // What follows the first damaged line is not used, and overwritten.
  std::optional<AnswerState> load(uint64_t line, Policy policy);
  void add(const AnswerProgress& progress);
  void finish(uint64_t line, Policy policy);

  uint64_t found() const { return found_; }  // files, at the start

 private:
  using Key = std::pair<uint64_t, Policy>;
  std::string path(const Key& key) const;
  std::string folder_, job_;
  uint64_t found_ = 0;
  std::map<Key, uint64_t> sound_;  // bytes of what load() has read
  std::map<Key, std::unique_ptr<Journal>> files_;
};

}  // namespace certkv
