// Vectors of the instruction set that a file is compiled for, by the compiler's vector types, and what kernels compute
// on them. Everything has internal linkage: the linker must not share a copy between instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../common/value.h"

namespace gradmem {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
// Rows of C that a matrix product keeps in registers, and the most vectors of columns.
constexpr int PRODUCT_ROWS = 8, PRODUCT_VECTORS = 3;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
constexpr int PRODUCT_ROWS = 6, PRODUCT_VECTORS = 2;
#else
constexpr int VECTOR_BYTES = 16;
constexpr int PRODUCT_ROWS = 6, PRODUCT_VECTORS = 2;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;
template <class T>
constexpr int WIDTH = VECTOR_BYTES / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
inline Vec<T> all(T x) {
  return Vec<T>{} + x;
}

// 0, 1, ... WIDTH - 1.
template <class T>
using LaneNumbers = std::make_integer_sequence<int, WIDTH<T>>;

// Lane i is lane FROM[i] of a and b, one behind the other.
template <class T, int... FROM>
inline Vec<T> lanes(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, FROM...);
#else
  return __builtin_shuffle(a, b, Int<T>{FROM...});
#endif
}

// Lane i is lane i ^ STEP of v.
template <class T, int STEP, int... I>
inline Vec<T> exchanged(Vec<T> v, std::integer_sequence<int, I...>) {
  return lanes<T, (I ^ STEP)...>(v, v);
}

template <class T, int STEP = WIDTH<T> / 2>
inline T sum(Vec<T> v) {
  if constexpr (STEP == 0)
    return v[0];
  else
    return sum<T, STEP / 2>(v + exchanged<T, STEP>(v, LaneNumbers<T>{}));
}

template <class T, int STEP = WIDTH<T> / 2>
inline T largest(Vec<T> v) {
  if constexpr (STEP == 0) {
    return v[0];
  } else {
    const Vec<T> other = exchanged<T, STEP>(v, LaneNumbers<T>{});
    return largest<T, STEP / 2>(other > v ? other : v);
  }
}

// Exchanges lanes i + STEP of a with lanes i of b.
template <class T, int STEP, int... I>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  const Vec<T> low = lanes<T, (I & STEP ? WIDTH<T> + I - STEP : I)...>(a, b);
  b = lanes<T, (I & STEP ? WIDTH<T> + I : I + STEP)...>(a, b);
  a = low;
}

// Transposes a square of WIDTH vectors: one bit of row and lane after the other changes places.
template <class T, int STEP = 1>
inline void transpose_square(Vec<T>* rows) {
  if constexpr (STEP < WIDTH<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH<T>; ++i)
      if (!(i & STEP)) exchange<T, STEP>(rows[i], rows[i + STEP], LaneNumbers<T>{});
    transpose_square<T, 2 * STEP>(rows);
  }
}

// What exp and expm1 are made of: exp(x) = scale * (1 + p), scale a power of two, for x clamped to where it is normal.
template <class T>
struct Exponential {
  Vec<T> scale, p;
};

template <class T>
inline Exponential<T> exponential(Vec<T> x);

template <>
inline Exponential<float> exponential<float>(Vec<float> x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the last bits
  const Vec<float> t = x * 1.44269504f + magic, n = t - magic;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> q = r * (1.0f / 5040) + 1.0f / 720;
  q = q * r + 1.0f / 120;
  q = q * r + 1.0f / 24;
  q = q * r + 1.0f / 6;
  q = q * r + 0.5f;
  const Int<float> bits = ((Int<float>)t + (127 - 0x4b400000)) << 23;
  return {(Vec<float>)bits, q * (r * r) + r};
}

template <>
inline Exponential<double> exponential<double>(Vec<double> x) {
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> t = x * 1.4426950408889634 + magic, n = t - magic;
  const Vec<double> r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  Vec<double> q = r * (1.0 / 6227020800) + 1.0 / 479001600;
  q = q * r + 1.0 / 39916800;
  q = q * r + 1.0 / 3628800;
  q = q * r + 1.0 / 362880;
  q = q * r + 1.0 / 40320;
  q = q * r + 1.0 / 5040;
  q = q * r + 1.0 / 720;
  q = q * r + 1.0 / 120;
  q = q * r + 1.0 / 24;
  q = q * r + 1.0 / 6;
  q = q * r + 0.5;
  const Int<double> bits = ((Int<double>)t + (1023 - 0x4338000000000000)) << 52;
  return {(Vec<double>)bits, q * (r * r) + r};
}

template <class T>
constexpr T LEAST_EXPONENT = sizeof(T) == 4 ? T(-87.3) : T(-708.3);
template <class T>
constexpr T MOST_EXPONENT = sizeof(T) == 4 ? T(88.3) : T(709.4);

template <class T>
inline Vec<T> clamp(Vec<T> x, T low, T high) {
  x = x < low ? all(low) : x;
  return x > high ? all(high) : x;
}

// exp(x) to about one unit in the last place; 0 where it would not be normal, for -inf too; infinity where it is large.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  const Exponential<T> e = exponential<T>(clamp(x, LEAST_EXPONENT<T>, MOST_EXPONENT<T>));
  Vec<T> y = e.scale + e.scale * e.p;
  y = x < LEAST_EXPONENT<T> ? all(T(0)) : y;
  y = x > MOST_EXPONENT<T> ? all(T(__builtin_inf())) : y;
  return x == x ? y : x;
}

// tanh(x) by exp(-2|x|) - 1, which is exact near 0 too.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const Vec<T> size = x < T(0) ? -x : x;
  const Exponential<T> e = exponential<T>(clamp(size * T(-2), LEAST_EXPONENT<T>, T(0)));
  const Vec<T> m = e.scale * e.p + (e.scale - T(1));
  const Vec<T> y = -m / (m + T(2));
  return x == x ? (x < T(0) ? -y : y) : x;
}

// Vectors as values of the shared rules.
template <class T>
struct VectorMath {
  using Number = T;
  static Vec<T> exp(Vec<T> x) { return gradmem::exp<T>(x); }
};
template <>
struct Math<Vec<float>> : VectorMath<float> {};
template <>
struct Math<Vec<double>> : VectorMath<double> {};

}  // namespace
}  // namespace gradmem
