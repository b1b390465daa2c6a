// Rows of a tensor as vectors of what kernels compute with, and vectors written to them.
#pragma once

#include "simd.h"
#include "tensor.h"

namespace gradmem {
namespace {

// How many elements a vector has of a row: all, or those that are left at its end.
struct Whole {};

template <class T>
using Lanes = Vec<Wide<T>>;

inline Vec<float> read(const float* p, Whole = {}) { return load(p); }
inline Vec<double> read(const double* p, Whole = {}) { return load(p); }
inline Vec<float> read(const BFloat16* p, Whole = {}) {
  typedef std::uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vec<float>)(__builtin_convertvector(half, Int<float>) << 16);
}

inline void write(float* p, Vec<float> v, Whole = {}) { store(p, v); }
inline void write(double* p, Vec<double> v, Whole = {}) { store(p, v); }
// As narrow() of tensor.h rounds.
inline void write(BFloat16* p, Vec<float> v, Whole = {}) {
  typedef std::uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::uint16_t Half __attribute__((vector_size(VECTOR_BYTES / 2)));
  const Bits bits = (Bits)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Half half = __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Half);
  __builtin_memcpy(p, &half, sizeof half);
}

// Elements beyond ``count`` are zeros.
template <class T>
inline Lanes<T> read(const T* p, Index count) {
  T copy[WIDTH<Wide<T>>] = {};
  std::memcpy(static_cast<void*>(copy), p, count * sizeof(T));
  return read(copy);
}

template <class T>
inline void write(T* p, Lanes<T> v, Index count) {
  T copy[WIDTH<Wide<T>>];
  write(copy, v);
  std::memcpy(static_cast<void*>(p), copy, count * sizeof(T));
}

// A known zero where there is no tensor; and where nobody asked for a result, nothing.
template <class T, class Count>
inline Lanes<T> read_if(const T* p, Index at, Count count) {
  return p == nullptr ? Lanes<T>{} : read(p + at, count);
}

template <class T, class Count>
inline void write_if(T* p, Index at, Lanes<T> v, Count count) {
  if (p != nullptr) write(p + at, v, count);
}

// What will be read again of a vector that was written.
inline Vec<float> rounded(Vec<float> v, const float*) { return v; }
inline Vec<double> rounded(Vec<double> v, const double*) { return v; }
inline Vec<float> rounded(Vec<float> v, const BFloat16*) {
  BFloat16 copy[WIDTH<float>];
  write(copy, v);
  return read(copy);
}

// v, with zeros beyond ``count``.
template <class V>
inline V keep(V v, Whole) {
  return v;
}
template <class V>
inline V keep(V v, Index count) {
  for (Index i = count; i < Index(sizeof v / sizeof v[0]); ++i) v[i] = 0;
  return v;
}

// f(place, count) for the vectors of a row.
template <class A, class F>
inline void by_vectors(Index width, F f) {
  Index j = 0;
  for (; j + WIDTH<A> <= width; j += WIDTH<A>) f(j, Whole{});
  if (j < width) f(j, width - j);
}

// Sums of vectors of a row that do not wait for each other: f(sum, place, count) adds to one of them.
template <class A, class Sums, class F>
inline Sums sum_of_vectors(Index width, F f) {
  constexpr Index W = WIDTH<A>;
  Sums sums[4] = {};
  Index j = 0;
  for (; j + 4 * W <= width; j += 4 * W) {
    f(sums[0], j, Whole{});
    f(sums[1], j + W, Whole{});
    f(sums[2], j + 2 * W, Whole{});
    f(sums[3], j + 3 * W, Whole{});
  }
  for (; j + W <= width; j += W) f(sums[0], j, Whole{});
  if (j < width) f(sums[1], j, width - j);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Row i of a tensor that lies as as_rows() of gradmem_kernels/operators/rows.py says; null for an absent one.
template <class T>
inline T* row(const View<2>& t, Index i, Index inner) {
  if (!t) return nullptr;
  return static_cast<T*>(t.data) + i / inner * t.strides[0] + i % inner * t.strides[1];
}

// Row i of a dense result.
template <class T>
inline T* row(void* t, Index i, Index width) {
  return t == nullptr ? nullptr : static_cast<T*>(t) + i * width;
}

}  // namespace
}  // namespace gradmem
