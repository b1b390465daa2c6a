// Rotary embedding on CPUs: the arguments of its kernel. Formulas: docs/rotary.md.
#pragma once

#include "tensor.h"

namespace gradmem {

// x and y are [B, H, S, d], with strides of sample, head and position; cos and sin [B, S, half], with those of sample
// and position, of x's dtype or float32 beside bfloat16.
struct Rotary {
  Dtype dtype, table_dtype;
  int threads;
  Index batch, heads, length, d, half;
  View<3> x, y;
  View<2> cos, sin;
  bool transposed;  // turn by the opposite angles
};

}  // namespace gradmem
