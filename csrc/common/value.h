// What the shared rules compute with. They are templates of a value type V: a number, or a vector of the CPU kernels
// (csrc/cpu/simd.h). Everything has internal linkage: CPU kernels are compiled for several instruction sets.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define GRADMEM_INLINE __host__ __device__ inline
#define GRADMEM_UNROLL _Pragma("unroll")
#else
#define GRADMEM_INLINE inline
#define GRADMEM_UNROLL _Pragma("GCC unroll 32")
#endif

namespace gradmem {
namespace {

// The type of a number in V, and functions of V.
template <class V>
struct Math;

template <>
struct Math<float> {
  using Number = float;
  static GRADMEM_INLINE float exp(float x) { return ::expf(x); }
  static GRADMEM_INLINE float sqrt(float x) { return ::sqrtf(x); }
};

template <>
struct Math<double> {
  using Number = double;
  static GRADMEM_INLINE double exp(double x) { return ::exp(x); }
  static GRADMEM_INLINE double sqrt(double x) { return ::sqrt(x); }
};

template <class V>
using Number = typename Math<V>::Number;

template <class V>
GRADMEM_INLINE V absolute(V x) {
  return x < Number<V>(0) ? -x : x;
}

}  // namespace
}  // namespace gradmem
