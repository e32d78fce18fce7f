// Stands in for libcuda, libcublasLt, libcudnn and libnccl: what `certkv doctor` asks them.
#include <cstddef>
#include <cstdio>

extern "C" {

int cuInit(unsigned) {
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13010;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 3;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = 100 + ordinal;  // a handle, not the ordinal
  return ordinal < 2 ? 0 : 101;
}
int cuDeviceGetName(char* name, int size, int device) {
  std::snprintf(name, size_t(size), "Stand-in %d", device);
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {
  *bytes = device == 100 ? size_t(80) << 30 : size_t(16) << 30;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? (device == 100 ? 9 : 7) : (device == 100 ? 0 : 5);
  return 0;
}
size_t cublasLtGetVersion() {
  return 130205;
}
size_t cudnnGetVersion() {
  return 91302;
}
int ncclGetVersion(int* version) {
  *version = 22809;
  return 0;
}

}  // extern "C"
