// What the backward kernels for Hopper share: the sums over a row that they read, and the values of a tile.
#pragma once

#include "attention_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

// What of a dual backward a kernel computes: the cotangents of q, k and v, those of their tangents, and whether o has a
// cotangent a. A plain backward is that of the tangents.
template <bool P, bool TANGENT, bool A>
struct Wanted {
  static constexpr bool primal = P, tangent = TANGENT, with_a = A;
};
using Plain = Wanted<false, true, false>;
using Double = Wanted<true, false, false>;  // of a double backward
using Primals = Wanted<true, false, true>;
using Both = Wanted<true, true, true>;

// Of a row: log-sum-exp, mu, D and D_t.
struct RowSums {
  float lse = INFINITE, mu = 0, d = 0, d_t = 0;
};

template <class W>
__device__ RowSums row_sums(const AttentionBackward& c, const float* sums, Index at) {
  RowSums row{static_cast<const float*>(c.lse)[at], 0, sums[at], 0};
  if constexpr (W::primal) {
    row.mu = static_cast<const float*>(c.mu)[at];
    row.d_t = sums[c.batch * c.heads * c.rows + at];
  }
  return row;
}

// Of an element, from S in the place of p, S_t in that of p_t, dP and dP_t in those of ds and ds_t: P,
// P_t = P * (S_t - mu), dS = P * (dP - D), dS_t = P_t * (dP - D) + P * (dP_t - D_t).
template <class W>
__device__ void combine(const RowSums& row, float scale, bool visible, float& p, float& p_t, float& ds, float& ds_t) {
  p = visible ? exp2f((p * scale - row.lse) * LOG2E) : 0;
  const float x = ds - row.d;
  ds = p * x;
  if constexpr (W::primal) {
    p_t = p * (p_t * scale - row.mu);
    ds_t = p_t * x + p * (ds_t - row.d_t);
  }
}

}  // namespace

// sums [2, B, Hq, Sq]: D = sum(b * o), and with tangents D_t = sum(a * o + b * o_t).
void attention_backward_queries(const AttentionBackward& c, const float* sums);
void attention_backward_keys(const AttentionBackward& c, const float* sums);

}  // namespace cuda
}  // namespace gradmem
