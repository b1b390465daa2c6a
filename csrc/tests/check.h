// What tests in C++ share: CHECK prints what does not hold, and a program of tests returns run(...) of its tests.
#pragma once

#include <cstdio>
#include <initializer_list>

namespace gradmem {
namespace {

int failures = 0;

#define CHECK(condition, ...)                                       \
  do {                                                              \
    if (!(condition) && ++failures <= 20) {                         \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);   \
      std::printf(__VA_ARGS__);                                     \
      std::printf("\n");                                            \
    }                                                               \
  } while (0)

// Whether this machine has the instruction set that this file is compiled for.
inline bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

// 77 has CTest report that the tests were skipped.
inline int run(std::initializer_list<void (*)()> tests) {
  if (!runs_here()) {
    std::printf("this machine does not have the instruction set\n");
    return 77;
  }
  for (void (*test)() : tests) test();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace gradmem
