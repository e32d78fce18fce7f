// JSON that somebody else wrote, read within limits.
//
// nlohmann's parser itself takes any depth, size and number of values, and lets the last of two
// equal keys win; whoever copies the result then overflows the stack. Here a text is refused by
// name before it becomes large: bytes, depth, values, equal keys, invalid UTF-8, trailing garbage.
//
// THREADS: all functions are stateless.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace certkv {

struct JsonLimits {
  size_t max_bytes = size_t(64) << 20;
  size_t max_depth = 64;                // a scalar has depth 0, [] 1, [[]] 2
  size_t max_values = size_t(8) << 20;  // scalars, arrays and objects together
};

// Parses a whole text. `name` says in errors where the text came from.
// ERRORS: BadFile for a text that is not JSON or is beyond a limit.
nlohmann::json parse_json(std::string_view text, const std::string& name,
                          const JsonLimits& limits = {});

// ERRORS: BadFile for a file that is missing, unreadable, not regular, too large, or not JSON.
nlohmann::json load_json_file(const std::string& path, const JsonLimits& limits = {});

// Reads a regular file of at most max_bytes. ERRORS: BadFile.
std::string read_file_bounded(const std::string& path, size_t max_bytes);

// The path of a file of a model folder whose name may come from the folder's author. The name must
// be a plain file name, and what it resolves to must lie in the folder; links of the Hugging Face
// cache (snapshots/REVISION/NAME -> blobs/HASH of the same model) are followed.
// ENSURES: the result exists. ERRORS: BadFile, InvalidArgument where the folder does not exist.
std::string path_in_folder(const std::string& folder, std::string_view file_name);

// True where path_in_folder would find something, without following it.
bool folder_has(const std::string& folder, std::string_view file_name);

// Members of an object, checked. `name` is the text's name for errors.
// ERRORS: BadFile where the member is missing, of another type, or out of [least, most].
const nlohmann::json& json_member(const nlohmann::json& object, const char* key,
                                  const std::string& name);
int64_t json_integer(const nlohmann::json& object, const char* key, int64_t least, int64_t most,
                     const std::string& name);
const std::string& json_string(const nlohmann::json& object, const char* key,
                               const std::string& name);
// Absent or null: the fallback.
bool json_bool_or(const nlohmann::json& object, const char* key, bool fallback,
                  const std::string& name);

}  // namespace certkv
