// Lines of a file, read in order with a limit on the length of one line.
//
// ERRORS: IoError when reading fails. An overlong line is not an error: it is reported and skipped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace certkv {

class LineReader {
 public:
  // Takes no ownership of fd, which must be a regular file positioned anywhere: reading starts at
  // byte 0 and leaves the file's own position alone. `name` is what errors call the file.
  LineReader(int fd, std::string name, size_t max_line_bytes);

  struct Line {
    std::string text;     // without the newline; empty when overlong
    uint64_t number = 0;  // from 1
    uint64_t offset = 0;  // byte of its first character in the file
    uint64_t bytes = 0;   // of the text, also when overlong
    bool overlong = false;
    bool terminated = false;  // false: the file ended without a newline
  };

  // False at the end of the file.
  bool next(Line& line);

 private:
  bool fill();

  int fd_;
  std::string name_;
  size_t max_line_bytes_;
  std::vector<char> buffer_;
  size_t begin_ = 0, end_ = 0;  // unread part of buffer_
  uint64_t file_offset_ = 0;    // of buffer_[end_]
  uint64_t number_ = 0;
};

}  // namespace certkv
