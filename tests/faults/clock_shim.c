// LD_PRELOAD: a wall clock that jumps. Every few readings it is off by another CERTKV_CLOCK_JUMP
// seconds, forward and back; the monotonic clocks are left alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long jump(void) {
  static atomic_ulong readings;
  static long by = -1;
  if (by < 0) {
    const char* text = getenv("CERTKV_CLOCK_JUMP");
    by = text != NULL ? atol(text) : 0;
  }
  return (atomic_fetch_add(&readings, 1) / 3 % 2) ? by : -by;
}

int clock_gettime(clockid_t id, struct timespec* out) {
  static int (*real)(clockid_t, struct timespec*);
  if (real == NULL) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
  const int code = real(id, out);
  if (code == 0 && id == CLOCK_REALTIME) out->tv_sec += jump();
  return code;
}

int gettimeofday(struct timeval* restrict out, void* restrict zone) {
  struct timespec now;
  (void)zone;
  if (clock_gettime(CLOCK_REALTIME, &now) != 0) return -1;
  out->tv_sec = now.tv_sec;
  out->tv_usec = now.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* out) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now) != 0) return -1;
  if (out != NULL) *out = now.tv_sec;
  return now.tv_sec;
}
