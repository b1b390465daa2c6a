// What a kernel is told of a tensor, and how its elements become those that kernels compute with.
#pragma once

#include <cstdint>
#include <cstring>

namespace gradmem {

using Index = std::int64_t;

// Codes that Python passes (gradmem_kernels/native/common.py).
enum class Dtype : int { float64 = 0, float32 = 1, bfloat16 = 2 };

// The first element, and the strides of the first N dimensions in elements; a null pointer is a tensor that is absent.
template <int N>
struct View {
  void* data = nullptr;
  Index strides[N] = {};

  explicit operator bool() const { return data != nullptr; }
};

namespace {

struct BFloat16 {
  std::uint16_t bits;
};

inline float widened(BFloat16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float widened(float x) { return x; }
inline double widened(double x) { return x; }

// To the nearest, ties to even; a NaN stays one.
inline void narrow(float x, BFloat16* y) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y->bits = x != x ? 0x7fc0 : std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, float* y) { *y = x; }
inline void narrow(double x, double* y) { *y = x; }

// Calls f with a null pointer to the type of the tensors' elements: f(static_cast<T*>(nullptr)).
template <class F>
inline void by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64:
      return f(static_cast<double*>(nullptr));
    case Dtype::float32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

// What kernels compute with.
template <class T>
struct WideOf {
  using type = T;
};
template <>
struct WideOf<BFloat16> {
  using type = float;
};
template <class T>
using Wide = typename WideOf<T>::type;

}  // namespace
}  // namespace gradmem
