// Rows of linear_cross_entropy on CPUs: the arguments of their two kernels. Formulas: csrc/common/softmax.h.
#pragma once

#include "tensor.h"

namespace gradmem {

// z and z_t, absent where there are no tangents, are [rows, width] with strides of rows, of float32 or float64, and so
// is everything else, [rows], but labels. a and b are the cotangents of a row's loss and its tangent. With a b, dz_t takes
// the place of z and dz that of z_t; without one, what takes the place of z is dz for an a of 1, and z_t is left alone.
struct CrossEntropy {
  Dtype dtype;
  int threads;
  Index rows, width;
  View<1> z, z_t;
  const Index* label;
  void *a, *b, *lse, *mu;
};

// Each row's loss and its tangent, lse and mu; cotangents if they are wanted.
struct CrossEntropyForward : CrossEntropy {
  void *row, *row_t;
  bool wanted;
};

// Cotangents from lse and mu.
struct CrossEntropyBackward : CrossEntropy {};

}  // namespace gradmem
