// The rules of inner_sgd in each element, given inner products of its sample: u = s * h, h = clamp(g). Derivations:
// docs/inner_sgd.md. S is the type of a number in the value type V.
#pragma once

#include "value.h"

namespace gradmem {
namespace {

// Added to the norm that is divided by.
constexpr double SGD_EPS = 1e-6;

template <class V>
GRADMEM_INLINE V clamped(V g, Number<V> bound) {
  g = g > bound ? V{} + bound : g;
  return g < -bound ? V{} - bound : g;
}

// dh/dg: 1 inside and on the bounds.
template <class V>
GRADMEM_INLINE V clamp_slope(V g, Number<V> bound) {
  using S = Number<V>;
  return absolute(g) <= bound ? V{} + S(1) : V{};
}

// Of a sample: s = c / (n + EPS), n = |h|, where n > c, else 1; k of ds = -k * <h, dh>; and their tangents along h_t.
template <class S>
struct Clip {
  S s, k, s_t, k_t;
};

// From <h, h> and <h, h_t>; an infinite bound is none.
template <class S>
GRADMEM_INLINE Clip<S> clip_of(S h_h, S h_ht, S bound) {
  const S n = Math<S>::sqrt(h_h);
  if (!(n > bound)) return {S(1), S(0), S(0), S(0)};
  const S safe = n + S(SGD_EPS), s = bound / safe, k = s / (safe * n), s_t = -k * h_ht;
  return {s, k, s_t, s_t / n * (S(2) / safe + S(1) / n)};
}

// J v = s * v - k * h * <h, v>, where J = du/dh is symmetric.
template <class V>
GRADMEM_INLINE V clip_jacobian(const Clip<Number<V>>& clip, V h, V v, Number<V> h_v) {
  return clip.s * v - (clip.k * h_v) * h;
}

// The tangent of J v along h_t, v fixed: s_t * v - k_t * h * <h, v> - k * (h_t * <h, v> + h * <h_t, v>).
template <class V>
GRADMEM_INLINE V clip_jacobian_tangent(const Clip<Number<V>>& clip, V h, V h_t, V v, Number<V> h_v, Number<V> ht_v) {
  return clip.s_t * v - (clip.k_t * h_v + clip.k * ht_v) * h - (clip.k * h_v) * h_t;
}

}  // namespace
}  // namespace gradmem
