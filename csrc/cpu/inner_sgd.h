// inner_sgd on CPUs: the arguments of its two kernels. Formulas: csrc/common/sgd.h, docs/inner_sgd.md.
#pragma once

#include "tensor.h"

namespace gradmem {

// Tensors are [batch, width], dense. Absent inputs are known zeros, but for the rate: then it is lr. Absent results are
// not wanted. rate and rate_t are of the dtype that is computed with; their strides are of sample and element, 0 or 1.
struct InnerSGD {
  Dtype dtype;
  int threads;
  Index batch, width;
  double lr;
  bool clamp;  // by clip_value
  double clip_value, clip_norm;  // infinite where there is none
  void *grad, *grad_t;
  View<2> rate, rate_t;
};

struct InnerSGDForward : InnerSGD {
  void *memory, *memory_t, *y, *y_t;
};

// a and b are the cotangents of y and y_t. dr and dr_t, of the dtype that is computed with, have the rate's cotangents
// in each element, or of each sample, [batch], where its rate is one.
struct InnerSGDBackward : InnerSGD {
  void *a, *b, *dg, *dg_t, *dr, *dr_t;
};

}  // namespace gradmem
