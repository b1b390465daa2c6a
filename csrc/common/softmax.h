// The rules of cross-entropy in each logit of a row, given the row's statistics. Derivation and names:
// docs/linear_cross_entropy.md. S is the type of a number in the value type V.
#pragma once

#include "value.h"

namespace gradmem {
namespace {

// The largest logit so far, and sum(exp(z - top)), sum(exp(z - top) * z_t) over those so far.
struct RowSums {
  double top, sum, product;
};

// The sums of two parts of a row.
GRADMEM_INLINE RowSums joined(RowSums a, RowSums b) {
  const double top = a.top > b.top ? a.top : b.top;
  // a part may be empty, or have no logit above -infinity
  const double f = a.top == top ? 1 : Math<double>::exp(a.top - top);
  const double g = b.top == top ? 1 : Math<double>::exp(b.top - top);
  return {top, a.sum * f + b.sum * g, a.product * f + b.product * g};
}

template <class V>
struct LogitBars {
  V dz, dz_t;
};

// With P = exp(z - base) * factor, P_t = P * (z_t - mu), and hot = 1 at the label and 0 elsewhere:
// dz_t = P - hot,  dz = a * (P - hot) + b * P_t
template <class V>
GRADMEM_INLINE LogitBars<V> logit_bars(V z, V z_t, Number<V> hot, Number<V> base, Number<V> factor, Number<V> mu,
                                       Number<V> a, Number<V> b) {
  const V p = Math<V>::exp(z - base) * factor, g = p - hot;
  return {a * g + b * (p * (z_t - mu)), g};
}

}  // namespace
}  // namespace gradmem
