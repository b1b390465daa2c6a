// The rules of rms_norm and layer_norm in each element of a row, given means over the row. Derivations:
// docs/rms_norm.md, docs/layer_norm.md. S is the type of a number in the value type V; what is absent is a zero.
#pragma once

#include "value.h"

namespace gradmem {
namespace {

// n = (x - mean) * r; rms_norm has a mean of 0.
template <class V>
GRADMEM_INLINE V normalised(V x, Number<V> mean, Number<V> rstd) {
  return (x - mean) * rstd;
}

// n_t = r * (x_t - mean(x_t) - n * mean(n * x_t))
template <class V>
GRADMEM_INLINE V normalised_tangent(V x_t, V n, Number<V> rstd, Number<V> xt_1, Number<V> xt_n) {
  return rstd * (x_t - xt_1 - n * xt_n);
}

template <class V>
struct Normed {
  V y, y_t;
};

// y = n * w + c,  y_t = n_t * w + n * w_t + c_t
template <class V>
GRADMEM_INLINE Normed<V> scaled(V n, V n_t, V w, V w_t, V c, V c_t) {
  return {n * w + c, n_t * w + n * w_t + c_t};
}

// What one element adds to the sums over its row, and, divided by the row's length, the means.
template <class V>
struct NormSums {
  V dn_1, dn_n, dnt_1, dnt_n, xt_1, xt_n, xt_dnt;
};

// dn = a * w + b * w_t,  dn_t = b * w
template <class V>
GRADMEM_INLINE void add_norm_sums(NormSums<V>& sums, V n, V x_t, V a, V b, V w, V w_t) {
  const V dn = a * w + b * w_t, dn_t = b * w;
  sums.dn_1 += dn;
  sums.dn_n += n * dn;
  sums.dnt_1 += dn_t;
  sums.dnt_n += n * dn_t;
  sums.xt_1 += x_t;
  sums.xt_n += n * x_t;
  sums.xt_dnt += x_t * dn_t;
}

// The same where there are neither tangents nor an a.
template <class V>
GRADMEM_INLINE void add_plain_norm_sums(NormSums<V>& sums, V n, V b, V w) {
  sums.dnt_1 += b * w;
  sums.dnt_n += n * b * w;
}

template <class V>
struct NormCotangents {
  V dx, dx_t, dw, y_t;
};

// With e = dn_t - mean(dn_t) - n * mean(n * dn_t), c = mean(n * dn_t):
// dx_t = r * e
// dx = r * (dn - mean(dn) - (mean(n * dn) + mean(n_t * dn_t)) * n - c * n_t - r * mean(n * x_t) * e)
// dw = a * n + b * n_t
template <class V>
GRADMEM_INLINE NormCotangents<V> norm_cotangents(const NormSums<Number<V>>& mean, Number<V> rstd, V n, V x_t, V a, V b,
                                                 V w, V w_t, V c_t) {
  using S = Number<V>;
  const V n_t = normalised_tangent(x_t, n, rstd, mean.xt_1, mean.xt_n);
  const V e = b * w - mean.dnt_1 - n * mean.dnt_n;
  // mean(n_t * dn_t) = r * (mean(x_t * dn_t) - mean(x_t) * mean(dn_t) - mean(n * x_t) * mean(n * dn_t))
  const S nt_dnt = rstd * (mean.xt_dnt - mean.xt_1 * mean.dnt_1 - mean.xt_n * mean.dnt_n);
  const V dn = a * w + b * w_t;
  const V dx = dn - mean.dn_1 - (mean.dn_n + nt_dnt) * n - mean.dnt_n * n_t - (rstd * mean.xt_n) * e;
  return {rstd * dx, rstd * e, a * n + b * n_t, n_t * w + n * w_t + c_t};
}

// dx_t where there are neither tangents nor an a.
template <class V>
GRADMEM_INLINE V plain_norm_cotangent(const NormSums<Number<V>>& mean, Number<V> rstd, V n, V b, V w) {
  return rstd * (b * w - mean.dnt_1 - n * mean.dnt_n);
}

}  // namespace
}  // namespace gradmem
