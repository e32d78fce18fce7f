// UCX set up the way that certkv needs it: which networks, no shared segments that others may read,
// messages of the library into our log. Included by parallel/ucx_*.cc alone.
#pragma once

#include <ucp/api/ucp.h>

#include <memory>
#include <span>
#include <string>

namespace certkv {

struct ContextDeleter {
  void operator()(ucp_context_h c) const { ucp_cleanup(c); }
};
using UcxContext = std::unique_ptr<ucp_context, ContextDeleter>;

// What UCX_TLS is to be for a requirement, given what the user has set it to (null: nothing). Never
// empty, never with sysv in it, whose segments are readable by the group. Throws InvalidArgument
// for a requirement that is not known.
std::string ucx_transports(const std::string& require, const char* user);

// Throws CommError that names the requirement where it is not met.
UcxContext make_ucx_context(const std::string& require);

// "tcp over eth0, lo; self over memory": what the context may use.
std::string ucx_networks(ucp_context_h context);

std::string ucx_text(ucs_status_t status);

}  // namespace certkv
