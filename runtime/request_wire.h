// A request as bytes, as the leader broadcasts it to the ranks of its group.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "runtime/engine.h"

namespace certkv {

std::vector<std::byte> encode_request(const Request& request);
// Throws CommError where the bytes are not those of a request.
Request decode_request(std::span<const std::byte> bytes);

}  // namespace certkv
