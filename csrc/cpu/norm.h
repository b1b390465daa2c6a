// rms_norm and layer_norm on CPUs: the arguments of their two kernels. Formulas: csrc/common/norm.h.
#pragma once

#include "tensor.h"

namespace gradmem {

// Inputs are [rows, width] with two strides (as_rows() of gradmem_kernels/operators/rows.py), results dense. Absent
// inputs are known zeros, absent results are not wanted. w is the weight, c the bias. rms_norm has no mean. rstd and
// mean, [rows], are of the dtype that is computed with.
struct Norm {
  Dtype dtype;
  int threads;
  Index rows, width, inner;
};

// y, and with tangents y_t; of a sum x + r (and its tangent) s (and s_t) too.
struct NormForward : Norm {
  double eps;
  View<2> x, x_t, r, r_t;
  void *w, *w_t, *c, *c_t;
  void *y, *y_t, *s, *s_t, *rstd, *mean;
};

// a and b are the cotangents of y and y_t; g and h, those of the sum and its tangent, are added to dx and dx_t.
struct NormBackward : Norm {
  View<2> x, x_t, a, b, g, h;
  void *w, *w_t, *c_t, *rstd, *mean;
  void *dx, *dx_t, *y_t, *dw, *dw_t, *dc, *dc_t;
};

}  // namespace gradmem
