#include "runtime/journal.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "kernels/base/failpoint.h"
#include "runtime/json_file.h"
#include "runtime/line_reader.h"
#include "runtime/output_file.h"

namespace certkv {
namespace {

constexpr int kFormat = 1;
constexpr size_t kDigestChars = 16;
constexpr size_t kMaxRecordBytes = size_t(1) << 30;

std::string digest_of(std::string_view payload) {
  return fmt::format("{:016x}", XXH3_64bits(payload.data(), payload.size()));
}

uint64_t result_digest(std::string_view result) {
  return XXH3_64bits(result.data(), result.size());
}

std::string framed(std::string_view note, std::string_view result) {
  std::string payload;
  payload.reserve(note.size() + result.size() + 1);
  payload.append(note).append("\t").append(result);
  return digest_of(payload) + " " + payload + "\n";
}

struct Framed {
  bool whole = false;
  std::string_view note, result;
};

Framed unframed(const LineReader::Line& line) {
  const std::string_view text = line.text;
  if (!line.terminated || line.overlong || text.size() < kDigestChars + 2) return {};
  if (text[kDigestChars] != ' ') return {};
  const std::string_view payload = text.substr(kDigestChars + 1);
  const size_t tab = payload.find('\t');
  if (tab == std::string_view::npos || text.substr(0, kDigestChars) != digest_of(payload))
    return {};
  return {true, payload.substr(0, tab), payload.substr(tab + 1)};
}

std::string header_note(const std::string& job) {
  return nlohmann::json{{"format", kFormat}, {"job", job}}.dump();
}

void check_header(std::string_view note, const std::string& job, const std::string& path) {
  const nlohmann::json header = parse_json(note, path + ": header");
  CERTKV_EXPECT(header.value("format", nlohmann::json()) == kFormat, BadFile,
                "{}: a journal of another format: {}; this version reads format {}", path,
                header.value("format", nlohmann::json()).dump(), kFormat);
  CERTKV_EXPECT(header.value("job", nlohmann::json()) == job, InvalidArgument,
                "{}: this journal belongs to another job (another input, model or option that "
                "changes answers); choose another folder with --output",
                path);
}

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

JournalContents read_journal(const std::string& path, const std::string& job,
                             const JournalVisitor& visit) {
  JournalContents contents;
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) {
    CERTKV_EXPECT(errno == ENOENT, IoError, "{}: {}", path, std::strerror(errno));
    return contents;
  }
  LineReader lines(file.fd, path, kMaxRecordBytes);
  LineReader::Line line;
  while (lines.next(line)) {
    CERTKV_FAILPOINT_BYTES(journal_read, line.text.data(), line.text.size());
    const Framed record = unframed(line);
    if (!record.whole) {
      ++contents.dropped;
      continue;
    }
    // A damaged header would leave it open to which job the records after it belong.
    CERTKV_EXPECT(contents.exists || line.number == 1, BadFile,
                  "{}: the first line is damaged, so its records cannot be trusted; remove the "
                  "file, and its requests are done again",
                  path);
    contents.whole_bytes = line.offset + line.bytes + 1;
    if (!contents.exists) {
      check_header(record.note, job, path);
      contents.exists = true;
      continue;
    }
    ++contents.records;
    const uint64_t at = line.offset + uint64_t(record.result.data() - line.text.data());
    visit(record.note, record.result, {at, record.result.size(), result_digest(record.result)});
  }
  return contents;
}

Journal::Journal(std::string path, const std::string& job, const JournalContents& contents,
                 Sync sync)
    : file_(std::make_unique<AppendFile>(std::move(path),
                                         contents.exists ? contents.whole_bytes : 0)),
      sync_(sync) {
  if (contents.exists) return;
  file_->append(framed(header_note(job), ""));
  if (sync_ == Sync::Each) file_->sync();
}

Journal::~Journal() = default;

JournalPosition Journal::append(std::string_view note, std::string_view result) {
  CERTKV_EXPECT(note.find_first_of("\t\n") == std::string_view::npos &&
                    result.find_first_of("\t\n") == std::string_view::npos,
                InvalidArgument, "a journal record holds a raw tab or line feed");
  const uint64_t at = file_->bytes() + kDigestChars + 1 + note.size() + 1;
  std::string record = framed(note, result);
  CERTKV_FAILPOINT_BYTES(journal_record, record.data(), record.size() - 1);
  file_->append(record);
  if (sync_ == Sync::Each) file_->sync();
  return {at, result.size(), result_digest(result)};
}

const std::string& Journal::path() const {
  return file_->path();
}

JournalResults::JournalResults(const std::string& path)
    : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  CERTKV_EXPECT(fd_ >= 0, IoError, "{}: {}", path, std::strerror(errno));
}

JournalResults::~JournalResults() {
  ::close(fd_);
}

std::string JournalResults::read(JournalPosition where) const {
  std::string text(where.bytes, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n =
        ::pread(fd_, text.data() + done, text.size() - done, off_t(where.offset + done));
    if (n < 0 && errno == EINTR) continue;
    CERTKV_EXPECT(n > 0, IoError, "{}: reading failed at byte {}: {}", path_, where.offset + done,
                  n < 0 ? std::strerror(errno) : "the file became shorter");
    done += size_t(n);
  }
  CERTKV_FAILPOINT_BYTES(journal_result, text.data(), text.size());
  CERTKV_EXPECT(
      result_digest(text) == where.digest, IoError,
      "{}: the result at byte {} was changed or damaged since it was written; continue with "
      "--resume: its line is done again",
      path_, where.offset);
  return text;
}

}  // namespace certkv
