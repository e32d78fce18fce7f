// Engine records as JSON: figures that may not be finite, counts, distributions, and the exact
// round trip of completions between ranks and through the journal.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "runtime/engine.h"

namespace certkv {

// object[key] = x, with every digit, so that no bound is rounded down. NaN and infinity, which JSON
// has not, become null, and object["notes"][key] says which.
void put_figure(nlohmann::json& object, const char* key, double x);

// {"relative": x} or {"absolute": x}
nlohmann::json tolerance_json(const Tolerance& tolerance);

// Adds head_steps, certified, exact, over, failed, rungs, promoted_keys, promoted_values,
// scratch_hit_rate (null where no originals were wanted), paged_bytes, prefetched_blocks,
// prefetched_used_blocks, bytes_read_per_token, bytes_read_share, canary_failures,
// digest_failures.
void put_counts(nlohmann::json& object, const HeadStepCounts& counts);

// Text of a JSON value on one line. Bytes that are no UTF-8 become U+FFFD.
std::string json_line(const nlohmann::json& value);

// Exact round trips; the figures may be NaN or infinite. Texts come back as valid UTF-8.
// Decoding throws BadFile for anything that encode_completion did not make.
std::string encode_completion(const Completion& completion);
Completion decode_completion(std::string_view text);

// Inside other JSON, as the journal has it.
nlohmann::json completion_json(const Completion& completion);
Completion completion_from_json(const nlohmann::json& value);

// A figure for people: `digits` significant ones, rounded up, so that a bound is never understated.
// "nan" and "inf" as such.
std::string upper_text(double x, int digits = 3);

}  // namespace certkv
