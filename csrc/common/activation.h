// The rules of swiglu and gelu, y = f(x) * up, in each element. Derivations: docs/swiglu.md, docs/gelu.md.
#pragma once

#include "value.h"

namespace gradmem {

enum class Form : int { silu = 0, gelu = 1, gelu_tanh = 2 };

namespace {

// f, f' and f'' at an x; what the caller does not use, the compiler leaves out.
template <class V>
struct Derivatives {
  V f, f1, f2;
};

// sigmoid(x), and 1 less it, both without cancellation and overflow.
template <class V>
struct Sigmoid {
  V value, rest;
};

template <class V>
GRADMEM_INLINE Sigmoid<V> sigmoid(V x) {
  using S = Number<V>;
  const V e = Math<V>::exp(-absolute(x)), large = S(1) / (S(1) + e), small = e * large;
  return {x < S(0) ? small : large, x < S(0) ? large : small};
}

// g of Q(x) = exp(-x^2 / 2) * t * g(t), Q = 1 - Phi the normal law's tail, t = 4 / (4 + x), x >= 0; as a polynomial of
// s = 2 t - 1. It interpolates erfc(x / sqrt(2)) * exp(x^2 / 2) / (2 t), computed with 60 digits, at Chebyshev's nodes
// on 0 <= t <= 1; within 4.8e-8 of it for float and 1.6e-16 for double.
template <class V>
GRADMEM_INLINE V normal_tail(V s) {
  if constexpr (sizeof(Number<V>) == sizeof(float)) {
    constexpr float g[] = {0.188821286f,     0.151974097f,      0.0967843533f,     0.0466317013f,
                           0.0150991511f,    0.00187797297f,    -0.00086995773f,   -0.000390834262f,
                           3.33775606e-05f,  3.92803886e-05f,   -4.18328852e-07f};
    V sum = V{} + g[10];
    GRADMEM_UNROLL
    for (int i = 9; i >= 0; --i) sum = sum * s + g[i];
    return sum;
  } else {
    constexpr double g[] = {0.18882128260393788,     0.15197416049297327,     0.096784350185554133,
                            0.046630464489891797,    0.015099143722690601,    0.0018850472422843282,
                            -0.00086992309072258893, -0.00040770462197059108, 3.3336064725932094e-05,
                            5.7773787696921853e-05,  -4.7697687209841888e-07, -8.7864111464559619e-06,
                            1.7881843773272038e-07,  1.4807449569186901e-06,  -1.5655171917398999e-07,
                            -2.5677372017785853e-07, 6.6558197472089055e-08,  4.0579794201183914e-08,
                            -1.9974626881405649e-08, -4.9020847852348786e-09, 4.1340111938766006e-09,
                            3.2114547174813172e-10,  -4.4343512609872769e-10};
    V sum = V{} + g[22];
    GRADMEM_UNROLL
    for (int i = 21; i >= 0; --i) sum = sum * s + g[i];
    return sum;
  }
}

template <Form form, class V>
GRADMEM_INLINE Derivatives<V> derivatives(V x) {
  using S = Number<V>;
  if constexpr (form == Form::gelu) {
    // f = x * Phi, f' = Phi + x * phi, f'' = phi * (2 - x^2)
    const V e = Math<V>::exp(S(-0.5) * x * x), t = S(4) / (S(4) + absolute(x));
    const V tail = e * t * normal_tail(S(2) * t - S(1)), below = x < S(0) ? tail : S(1) - tail;
    const V density = e * S(0.3989422804014327);  // 1 / sqrt(2 pi)
    return {x * below, below + x * density, density * (S(2) - x * x)};
  } else if constexpr (form == Form::silu) {
    // with s = sigmoid(x): f = x * s, s' = s * (1 - s), f' = s + x * s', f'' = s' * (2 + x * (1 - 2 s))
    const Sigmoid<V> s = sigmoid(x);
    const V slope = s.value * s.rest;
    return {x * s.value, s.value + x * slope, slope * (S(2) + x * (s.rest - s.value))};
  } else {
    // with s = sigmoid(v) = (1 + tanh(v / 2)) / 2, v = 2 sqrt(2 / pi) * (x + 0.044715 x^3):
    // s' = slope * v',  s'' = slope * ((1 - 2 s) * v'^2 + v''),  f' = s + x * s',  f'' = 2 s' + x * s''
    constexpr S linear = S(1.5957691216057308), cubic = S(0.044715 * 1.5957691216057308);
    const V square = x * x, v1 = linear + S(3) * cubic * square, v2 = S(6) * cubic * x;
    const Sigmoid<V> s = sigmoid(x * (linear + cubic * square));
    const V slope = s.value * s.rest;
    return {x * s.value, s.value + x * slope * v1,
            slope * (S(2) * v1 + x * ((s.rest - s.value) * v1 * v1 + v2))};
  }
}

template <class V>
struct Activated {
  V y, y_t;
};

// y = f * up,  y_t = f' * x_t * up + f * up_t
template <Form form, class V>
GRADMEM_INLINE Activated<V> activate(V x, V up, V x_t, V up_t) {
  const Derivatives<V> d = derivatives<form>(x);
  return {d.f * up, d.f1 * x_t * up + d.f * up_t};
}

template <class V>
struct ActivationCotangents {
  V dx, dx_t, dup, dup_t, y_t;
};

// a and b are the cotangents of y and y_t:
// dx = f' * (a * up + b * up_t) + f'' * b * x_t * up,  dx_t = f' * b * up
// dup = f * a + f' * b * x_t,                          dup_t = f * b
template <Form form, class V>
GRADMEM_INLINE ActivationCotangents<V> activation_cotangents(V x, V up, V x_t, V up_t, V a, V b) {
  const Derivatives<V> d = derivatives<form>(x);
  const V x_t_up = x_t * up, b_x_t = b * x_t;
  return {d.f1 * (a * up + b * up_t) + d.f2 * b * x_t_up, d.f1 * b * up, d.f * a + d.f1 * b_x_t, d.f * b,
          d.f1 * x_t_up + d.f * up_t};
}

}  // namespace
}  // namespace gradmem
