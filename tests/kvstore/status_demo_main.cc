// Serves the sample report on a port of the system's choice until standard input ends:
// status_page_test.py looks at the page with a browser.
#include <cstdio>

#include "kvstore/http/status_server.h"
#include "tests/kvstore/status_reports.h"

int main() {
  const certkv::StatusThread server({.listen = "127.0.0.1:0"}, certkv::test::sample_report);
  std::printf("%s\n", server.url().c_str());
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  return 0;
}
