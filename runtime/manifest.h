// manifest.json: which job an output folder belongs to. Everything that decides answers is in its
// identity; a job is resumed only where the identity is the same.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "runtime/batch_io.h"
#include "runtime/options.h"

namespace certkv {

// What decides answers, by name: "input", "model.files", and the keys of the options that change
// answers ("tolerance", "cache.layout", ...), each as text.
using JobIdentity = std::map<std::string, std::string>;

JobIdentity identify_job(const JobOptions& options, const BatchSurvey& input,
                         const std::string& model_files);

// XXH3 (128 bits, hexadecimal) of the whole identity.
std::string identity_digest(const JobIdentity& identity);

// "cache.layout was compact and is now balanced", one entry per difference.
std::vector<std::string> identity_differences(const JobIdentity& then, const JobIdentity& now);

// A model folder's files (json, safetensors, model), by name. ERRORS: BadFile.
std::vector<std::filesystem::path> model_files(const std::string& folder);

// Of the names, sizes and contents of these files. Of one above 64 MiB, 64 stretches of 256 KiB, its
// first and last included. ERRORS: BadFile.
std::string digest_model_files(const std::string& folder);

struct ManifestSession {
  std::string name;     // unique in the job
  std::string started;  // UTC, as ISO 8601
  std::string host;
  int ranks = 1, tensor = 1, data = 1;
  std::string command;
  double audit_sample = 0;  // above 0: of the head-steps, in audit_folder
  std::string audit_folder;
};

// What the folder's manifest says about an earlier run. `exists` false: there is none.
struct EarlierJob {
  bool exists = false;
  JobIdentity identity;
  std::string text;  // of the whole file
};
EarlierJob read_manifest(const std::string& folder);  // throws BadFile

// Writes manifest.json atomically; the sessions of `earlier` are kept. `options` is the echo of all
// options ({"options": ..., "sources": ...}), may be empty.
void write_manifest(const std::string& folder, const JobIdentity& identity,
                    const BatchSurvey& input, const std::string& options_echo,
                    const ManifestSession& session, const EarlierJob& earlier);

}  // namespace certkv
