// What the subcommands of certkv bench share.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "launcher/commands.h"
#include "launcher/machine.h"

namespace certkv {

// Entry points of launcher/bench_<name>.cc; `values` is what follows the subcommand's name.
int bench_attention_command(const std::vector<std::string>& values);
// Both on a device, where values name one with --backend (launcher/bench_device.cc).
int bench_device_command(bool whole_steps, const std::vector<std::string>& values);
// Whether values hold --backend with another name than cpu.
bool asks_for_device(const std::vector<std::string>& values);
int bench_classes_command(const std::vector<std::string>& values);
int bench_decode_command(const std::vector<std::string>& values);   // launcher/bench_engine.cc
int bench_prefill_command(const std::vector<std::string>& values);  // launcher/bench_engine.cc

int bench_store_command(const std::vector<std::string>& values);    // launcher/bench_store.cc

// "a,b,c" without empty words. Throws InvalidArgument naming `key`.
std::vector<std::string> split_list(const std::string& text, const char* key);
// The same as numbers from `least` on.
std::vector<int64_t> split_numbers(const std::string& text, const char* key, int64_t least);

// cpu, features, cores, memory and cache sizes, what else ran (load_average before the measurement
// itself added to it), system, OpenBLAS's choice of code, compiler: what a figure belongs to.
nlohmann::ordered_json machine_json(const Machine& machine, int threads);

}  // namespace certkv
