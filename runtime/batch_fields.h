// The fields of one request: which are understood, which may only have the value that changes
// nothing, and which are ignored. Internal to the reading of batches (runtime/batch_io.h).
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "runtime/batch_io.h"

namespace certkv {

// Reads the body of a request into `line`. `outer` are names that the caller has dealt with.
// Throws InvalidArgument with a message that begins with the field's name.
void read_request_body(const nlohmann::json& body, BatchLine& line, const BatchLimits& limits);

// Reads `certkv: {...}`.
void read_certkv_field(const nlohmann::json& value, BatchLine& line, const BatchDefaults& defaults);

// Text of a value for a message, cut to a bearable length.
std::string shown(const nlohmann::json& value);

}  // namespace certkv
