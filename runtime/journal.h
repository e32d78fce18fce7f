// The journal: what is finished, on the disk before anything else happens.
//
// One file per replica, in completion order, one line per finished request and policy:
//
//   <16 hexadecimal digits> <note> TAB <result> LF
//
// The digits are the XXH3 (64 bits) of everything between the blank after them and the LF. `note`
// and `result` are JSON on one line; neither can hold a raw TAB or LF. The first line's note is the
// header {"format": 1, "job": digest}, its result is empty. `job` is the digest of everything that
// decides answers; a journal of another job is never added to.
//
// A crash leaves at most a torn last line, which is dropped when the file is next opened; a damaged
// line in the middle is dropped as well. Both are done again. After a failed append (full disk) the
// file is as it was before.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace certkv {

class AppendFile;

// Where a record's result lies in its file, and what it was when it was written or checked.
struct JournalPosition {
  uint64_t offset = 0, bytes = 0;
  uint64_t digest = 0;  // XXH3 (64 bits) of the result
};

using JournalVisitor =
    std::function<void(std::string_view note, std::string_view result, JournalPosition where)>;

struct JournalContents {
  bool exists = false;       // with a whole header
  uint64_t records = 0;      // without the header
  uint64_t dropped = 0;      // lines that do not match their digest, the torn last one included
  uint64_t whole_bytes = 0;  // end of the last whole line
};

// Reads a journal from its beginning. A missing file, or one torn within its header, does not
// exist. ERRORS: InvalidArgument for a journal of another job, BadFile for one whose header is
// damaged while records follow it, IoError when reading fails.
JournalContents read_journal(const std::string& path, const std::string& job,
                             const JournalVisitor& visit);

class Journal {
 public:
  enum class Sync { Each, Never };  // which appends wait for the disk
  // Goes on after the last whole line; `contents` comes from read_journal of the same file.
  Journal(std::string path, const std::string& job, const JournalContents& contents,
          Sync sync = Sync::Each);
  ~Journal();

  // On the disk when it returns, under Sync::Each. REQUIRES note and result without TAB and LF.
  // ERRORS: IoError; the journal is then as before, and can be appended to again.
  JournalPosition append(std::string_view note, std::string_view result);

  const std::string& path() const;

 private:
  std::unique_ptr<AppendFile> file_;
  Sync sync_;
};

// The result at a position, for copying it out.
class JournalResults {
 public:
  explicit JournalResults(const std::string& path);
  ~JournalResults();
  JournalResults(const JournalResults&) = delete;
  JournalResults& operator=(const JournalResults&) = delete;
  // ERRORS: IoError, also where the bytes are no longer what they were.
  std::string read(JournalPosition where) const;

 private:
  std::string path_;
  int fd_ = -1;
};

}  // namespace certkv
