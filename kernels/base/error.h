// The one error type of the project, and the macros that throw it.
//
// An error says what was wrong, where, and what to do. A certificate that does not hold is not an
// error but a value (kernels/arith/verdict.h); losing originals is an error.
//
// | kind             | what a caller may do                                               |
// |------------------|--------------------------------------------------------------------|
// | InvalidArgument  | correct the configuration, arguments or request; retry is useless  |
// | BadFile          | the named file is broken or of an unsupported kind                 |
// | OutOfMemory      | admit less, or ask for more (tier 1, scratch, arena, host memory)  |
// | OriginalsLost    | the request fails; the others go on                                |
// | Corrupt          | a digest or canary did not match; ask a replica, else fail request |
// | NonFinite        | the request fails; the others go on                                |
// | DeadlineExceeded | a peer showed no life within the deadline                          |
// | CommError        | the group of ranks is broken: the job ends and can be resumed      |
// | StoreLost        | the node's store is gone: the job ends and can be resumed          |
// | DeviceError      | the device backend failed                                          |
// | IoError          | writing results failed (disk full); the job ends, can be resumed   |
// | Uncertifiable    | no rung could produce a certified or exact output                  |
// | Stopped          | a signal asked the job to end; it can be resumed                   |
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace certkv {

enum class ErrorKind {
  InvalidArgument,
  BadFile,
  OutOfMemory,
  OriginalsLost,
  Corrupt,
  NonFinite,
  DeadlineExceeded,
  CommError,
  StoreLost,
  DeviceError,
  IoError,
  Uncertifiable,
  Stopped,
};

const char* error_kind_name(ErrorKind kind);

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, std::string message, const char* file = "", int line = 0);
  ErrorKind kind() const { return kind_; }
  // Where it was thrown, "file:line"; for logs, not for users.
  const std::string& where() const { return where_; }

 private:
  ErrorKind kind_;
  std::string where_;
};

}  // namespace certkv

// CERTKV_THROW(BadFile, "{}: header of {} bytes", path, n)
#define CERTKV_THROW(kind, ...) \
  throw ::certkv::Error(::certkv::ErrorKind::kind, ::fmt::format(__VA_ARGS__), __FILE__, __LINE__)

// CERTKV_EXPECT(n > 0, InvalidArgument, "tokens is {}: at least 1 is needed", n)
// The condition is written so that NaN fails it.
#define CERTKV_EXPECT(condition, kind, ...) \
  do {                                      \
    if (!(condition)) {                     \
      CERTKV_THROW(kind, __VA_ARGS__);      \
    }                                       \
  } while (false)
