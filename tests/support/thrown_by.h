#pragma once

#include <string>

#include "kernels/base/error.h"

namespace certkv {

// The text of the error that `body` throws, "kind: message"; empty where it throws none.
template <typename Body>
std::string thrown_by(Body body) {
  try {
    body();
  } catch (const Error& e) {
    return std::string(error_kind_name(e.kind())) + ": " + e.what();
  }
  return "";
}

}  // namespace certkv
