#include "parallel/ucx_context.h"

#include <ucs/debug/log_def.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/base/log.h"

namespace certkv {
namespace {

// UCX writes to standard output, where results go, and calls an error what is our daily bread (a
// peer that went): everything goes to our log, for those who debug.
ucs_log_func_rc_t log_from_ucx(const char* file, unsigned line, const char*, ucs_log_level_t level,
                               const ucs_log_component_config_t*, const char* message,
                               va_list arguments) {
  if (level == UCS_LOG_LEVEL_FATAL) return UCS_LOG_FUNC_RC_CONTINUE;  // UCX ends the process
  if (level > UCS_LOG_LEVEL_WARN) return UCS_LOG_FUNC_RC_STOP;
  char text[512];
  std::vsnprintf(text, sizeof text, message, arguments);
  log_debug("UCX: {} ({}:{})", text, file, line);
  return UCS_LOG_FUNC_RC_STOP;
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> words;
  std::stringstream in(text);
  for (std::string word; std::getline(in, word, at);) {
    if (!word.empty()) words.push_back(word);
  }
  return words;
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& w : words) text += (text.empty() ? "" : ",") + w;
  return text;
}

}  // namespace

std::string ucx_text(ucs_status_t status) {
  return ucs_status_string(status);
}

std::string ucx_transports(const std::string& require, const char* user) {
  if (require == "tcp") return "tcp";
  if (require == "rdma") return "rc,ud,dc";
  if (require == "shm") return "posix,cma,xpmem,tcp";  // connections are made over tcp
  CERTKV_EXPECT(require == "auto", InvalidArgument,
                "store.transport.require is '{}'; allowed: auto, tcp, shm, rdma", require);
  std::vector<std::string> words = split(user == nullptr ? "" : user, ',');
  if (words.empty() || (words.size() == 1 && words[0] == "all")) return "^sysv";
  if (words[0][0] == '^') return join(words) + ",sysv";
  std::vector<std::string> kept;
  for (const auto& w : words) {
    if (w == "sysv" || w == "all") continue;
    // These names stand for sysv among others.
    if (w == "sm" || w == "shm" || w == "mm") {
      kept.insert(kept.end(), {"posix", "cma", "xpmem"});
    } else {
      kept.push_back(w);
    }
  }
  CERTKV_EXPECT(!kept.empty(), InvalidArgument,
                "UCX_TLS is '{}': sysv is not used, since other users may read its segments", user);
  return join(kept);
}

UcxContext make_ucx_context(const std::string& require) {
  static std::once_flag once;
  std::call_once(once, [] {
    ucs_log_push_handler(log_from_ucx);
    // What UCX reads from the environment alone. What the user has set stays.
    // Without this one shared memory refuses endpoints that are told of errors.
    setenv("UCX_POSIX_ERROR_HANDLING", "y", 0);
    // A server that was killed comes back to its port at once; two at one port remain impossible.
    setenv("UCX_TCP_CM_REUSEADDR", "y", 0);
    setenv("UCX_RDMA_CM_REUSEADDR", "y", 0);
  });

  ucp_config_t* read = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &read);
  CERTKV_EXPECT(status == UCS_OK, CommError, "UCX does not read its configuration: {}",
                ucx_text(status));
  const std::unique_ptr<ucp_config_t, decltype(&ucp_config_release)> config(read,
                                                                            ucp_config_release);
  const auto set = [&](const char* key, const std::string& value) {
    const ucs_status_t s = ucp_config_modify(config.get(), key, value.c_str());
    CERTKV_EXPECT(s == UCS_OK, CommError, "UCX {} does not take {}={}: {}",
                  ucp_get_version_string(), key, value, ucx_text(s));
  };
  set("TLS", ucx_transports(require, std::getenv("UCX_TLS")));

  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.name = "certkv";
  ucp_context_h context = nullptr;
  status = ucp_init(&params, config.get(), &context);
  CERTKV_EXPECT(status == UCS_OK, CommError,
                "store.transport.require is '{}', but UCX finds no such network here ({}). "
                "`ucx_info -d` lists what it finds{}",
                require, ucx_text(status),
                require == "auto" ? "; UCX_TLS and UCX_NET_DEVICES limit it" : "");
  return UcxContext(context);
}

std::string ucx_networks(ucp_context_h context) {
  char* text = nullptr;
  size_t bytes = 0;
  FILE* out = open_memstream(&text, &bytes);
  if (out == nullptr) return "not known";
  ucp_context_print_info(context, out);
  std::fclose(out);
  const std::unique_ptr<char, decltype(&std::free)> owner(text, std::free);
  // Lines of interest: "#   resource 0  :  md 0  dev 0  flags -- tcp/lo".
  std::map<std::string, std::set<std::string>> found;
  std::stringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find("resource") == line.npos) continue;
    const size_t slash = line.rfind('/'), space = line.rfind(' ', slash);
    if (slash == line.npos || space == line.npos) continue;
    found[line.substr(space + 1, slash - space - 1)].insert(line.substr(slash + 1));
  }
  std::string result;
  for (const auto& [transport, devices] : found) {
    result += (result.empty() ? "" : "; ") + transport + " over ";
    result += join({devices.begin(), devices.end()});
  }
  return result.empty() ? "none" : result;
}

}  // namespace certkv
