// certkv make-model needle: writes a model whose weights are computed, not trained.
#include <fmt/core.h>

#include "launcher/commands.h"
#include "runtime/needle_model.h"
#include "runtime/options_io.h"

namespace certkv {

int make_model_command(Args& args) {
  std::string preset = "default", output, dtype = "float16";
  uint64_t seed = NeedleOptions().seed;
  OptionTable table;
  table.add("preset", &preset,
            {.meaning = "default survives quantisation; fragile is made so that naive quantisation "
                        "does not",
             .allowed = "default fragile"});
  table.add("output", &output,
            {.meaning = "folder to write, made if missing; empty: needle, or "
                        "needle-PRESET for another preset"});
  table.add("dtype", &dtype, {.meaning = "type of the weights", .allowed = "float16 bfloat16"});
  table.add("seed", &seed, {.meaning = "of the weights' random directions"});
  const auto parsed = table.read_arguments(args.values, 1);
  if (parsed.help) {
    fmt::print("usage: certkv make-model needle [--preset default|fragile] [--output FOLDER]\n\n{}",
               table.help());
    return kExitDone;
  }
  CERTKV_EXPECT(parsed.positional.size() == 1 && parsed.positional[0] == "needle", InvalidArgument,
                "command line: name the model to make: certkv make-model needle{}",
                parsed.positional.empty()
                    ? ""
                    : fmt::format(" ('{}' is not one that can be made)", parsed.positional[0]));
  NeedleOptions options = needle_preset(preset);
  options.seed = seed;
  options.dtype = dtype == "bfloat16" ? DType::BF16 : DType::F16;
  if (output.empty()) output = preset == "default" ? "needle" : "needle-" + preset;
  make_needle_model(options, output);
  fmt::print("{}\n", output);
  return kExitDone;
}

}  // namespace certkv
