#include "runtime/line_reader.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "kernels/base/error.h"

namespace certkv {

LineReader::LineReader(int fd, std::string name, size_t max_line_bytes)
    : fd_(fd), name_(std::move(name)), max_line_bytes_(max_line_bytes), buffer_(size_t(1) << 16) {}

bool LineReader::fill() {
  begin_ = end_ = 0;
  for (;;) {
    const ssize_t n = ::pread(fd_, buffer_.data(), buffer_.size(), off_t(file_offset_));
    if (n < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(n >= 0, IoError, "{}: reading failed at byte {}: {}", name_, file_offset_,
                  std::strerror(errno));
    end_ = size_t(n);
    file_offset_ += uint64_t(n);
    return n > 0;
  }
}

bool LineReader::next(Line& line) {
  line = Line{};
  if (begin_ == end_ && !fill()) return false;
  line.number = ++number_;
  line.offset = file_offset_ - (end_ - begin_);
  do {
    const char* from = buffer_.data() + begin_;
    const size_t left = end_ - begin_;
    const char* newline = static_cast<const char*>(std::memchr(from, '\n', left));
    const size_t take = newline != nullptr ? size_t(newline - from) : left;
    line.bytes += take;
    if (line.bytes > max_line_bytes_) {
      line.overlong = true;
      line.text.clear();
    } else {
      line.text.append(from, take);
    }
    begin_ += take;
    if (newline != nullptr) {
      ++begin_;
      line.terminated = true;
      return true;
    }
  } while (fill());
  return true;
}

}  // namespace certkv
