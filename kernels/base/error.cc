#include "kernels/base/error.h"

#include <cstring>

namespace certkv {

const char* error_kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::InvalidArgument: return "InvalidArgument";
    case ErrorKind::BadFile: return "BadFile";
    case ErrorKind::OutOfMemory: return "OutOfMemory";
    case ErrorKind::OriginalsLost: return "OriginalsLost";
    case ErrorKind::Corrupt: return "Corrupt";
    case ErrorKind::NonFinite: return "NonFinite";
    case ErrorKind::DeadlineExceeded: return "DeadlineExceeded";
    case ErrorKind::CommError: return "CommError";
    case ErrorKind::StoreLost: return "StoreLost";
    case ErrorKind::DeviceError: return "DeviceError";
    case ErrorKind::IoError: return "IoError";
    case ErrorKind::Uncertifiable: return "Uncertifiable";
    case ErrorKind::Stopped: return "Stopped";
  }
  return "unknown";
}

namespace {

std::string short_location(const char* file, int line) {
  if (file == nullptr || *file == '\0') return "";
  const char* slash = std::strrchr(file, '/');
  return fmt::format("{}:{}", slash != nullptr ? slash + 1 : file, line);
}

}  // namespace

Error::Error(ErrorKind kind, std::string message, const char* file, int line)
    : std::runtime_error(std::move(message)), kind_(kind), where_(short_location(file, line)) {}

}  // namespace certkv
