// Attention on CPUs: the arguments of its two kernels. Formulas and names: docs/attention.md.
#pragma once

#include "tensor.h"

namespace gradmem {

// What both kernels read. q, and everything of its shape, is [B, Hq, Sq, d]; k and v are [B, Hkv, Sk, d]; strides are
// those of sample, head and row, elements of a row are neighbours. _t: tangents, absent where they are known zeros.
struct Attention {
  Dtype dtype;
  int threads;
  Index batch, heads, kv_heads, rows, keys, d;
  View<3> q, k, v, q_t, k_t, v_t;
  bool causal;
  double scale;
  Index window;    // 0: none
  double softcap;  // 0: none
  double dropout;
  std::uint32_t seed;
  std::uint32_t threshold;  // a weight is kept where its random bits are at least this
  const Index* seqlens;     // [B], or null
  const Index* packed;      // [3, Sq], or null: a row's first key, the one behind its last, and position less row
  View<4> mask, bias;       // [B, Hq, Sq, Sk]; mask has bytes
  Dtype bias_dtype;
  Index tangent_rows[2];  // tangents of other rows of q, k and v are zeros
};

// o and lse [B, Hq, Sq]; with tangents o_t and mu too. lse and mu are of the dtype that is computed with. Known o and
// lse are read.
struct AttentionForward : Attention {
  bool known;
  View<3> o, o_t;
  void *lse, *mu;
};

// The cotangents that are not absent, of q, k, v and of their tangents, given those of o (a) and o_t (b). Written in
// grad_rows, or tangent_rows, alone. Without cotangents of q, k and v, neither a, o_t nor mu is read.
struct AttentionBackward : Attention {
  View<3> o, o_t, a, b;
  void *lse, *mu;
  View<3> dq, dk, dv, dq_t, dk_t, dv_t;
  Index grad_rows[2];
};

}  // namespace gradmem
