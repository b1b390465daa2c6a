// Rows of linear_cross_entropy on CUDA, a block for each: one pass over a row of logits for its statistics, and one
// that leaves their cotangents in the place of the logits. Formulas: csrc/common/softmax.h,
// docs/linear_cross_entropy.md.

#include "../common/softmax.h"
#include "kernels.h"
#include "rows.cuh"

namespace gradmem {
namespace {

constexpr int THREADS = 512;

template <class A>
__device__ inline A* at(const View<1>& t, Index row) {
  return t.data == nullptr ? nullptr : static_cast<A*>(t.data) + row * t.strides[0];
}

// A number of a row; of an absent array a zero.
template <class A>
__device__ inline A number(const void* array, Index row) {
  return array == nullptr ? A(0) : static_cast<const A*>(array)[row];
}

// The logit at a label; without one NaN.
template <class A>
__device__ inline A at_label(const A* z, Index label, Index width) {
  return label < 0 || label >= width ? A(__builtin_nan("")) : z[label];
}

// The sums of this thread's logits: they are scaled again where a larger one comes.
template <class A, int VEC>
__device__ inline RowSums of_thread(const A* z, const A* z_t, int width) {
  A top = -A(__builtin_inf()), base = 0, sum = 0, product = 0;
  Layout<VEC, 0, 0>::each(width, [&](int, int column) {
    const auto v = read_if<VEC>(z, column), v_t = read_if<VEC>(z_t, column);
    A largest = v.v[0];
    GRADMEM_UNROLL
    for (int e = 1; e < VEC; ++e) largest = v.v[e] > largest ? v.v[e] : largest;
    if (largest > top) {
      const A factor = Math<A>::exp(top - largest);
      sum *= factor;
      product *= factor;
      base = top = largest;
    }
    GRADMEM_UNROLL
    for (int e = 0; e < VEC; ++e) {
      const A p = Math<A>::exp(v.v[e] - base);
      sum += p;
      product += p * v_t.v[e];
    }
  });
  return {double(top), double(sum), double(product)};
}

// Those of the block, joined in an order that does not depend on the timing.
__device__ inline RowSums of_block(RowSums sums) {
  __shared__ RowSums of_warps[THREADS / WARP];
  GRADMEM_UNROLL
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    sums = joined(sums, {__shfl_xor_sync(0xffffffffu, sums.top, distance),
                         __shfl_xor_sync(0xffffffffu, sums.sum, distance),
                         __shfl_xor_sync(0xffffffffu, sums.product, distance)});
  __syncthreads();  // the sums before these have been read
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sums;
  __syncthreads();
  sums = of_warps[0];
  for (int warp = 1; warp < int(blockDim.x) / WARP; ++warp) sums = joined(sums, of_warps[warp]);
  return sums;
}

// The cotangents of a row's logits, and with a b those of their tangents.
template <class A, int VEC>
__device__ inline void write_bars(const CrossEntropy& c, Index row, A base, A factor, A mu) {
  A *z = at<A>(c.z, row), *z_t = c.b == nullptr ? nullptr : at<A>(c.z_t, row);
  const A a = number<A>(c.a, row), b = number<A>(c.b, row);
  const Index label = c.label[row];
  Layout<VEC, 0, 0>::each(int(c.width), [&](int, int column) {
    auto v = read_if<VEC>(z, column), v_t = read_if<VEC>(z_t, column);
    GRADMEM_UNROLL
    for (int e = 0; e < VEC; ++e) {
      const auto bars = logit_bars(v.v[e], v_t.v[e], A(column + e == label), base, factor, mu, a, b);
      v.v[e] = bars.dz_t;
      v_t.v[e] = bars.dz;
    }
    write_if<VEC>(z, column, v);
    write_if<VEC>(z_t, column, v_t);
  });
}

template <class A, int VEC>
__global__ void __launch_bounds__(THREADS, 1) cross_entropy_forward_kernel(const CrossEntropyForward c) {
  for (Index row = blockIdx.x; row < c.rows; row += gridDim.x) {
    const A *z = at<A>(c.z, row), *z_t = at<A>(c.z_t, row);
    const A z_label = at_label(z, c.label[row], c.width);
    const A z_t_label = z_t == nullptr ? A(0) : at_label(z_t, c.label[row], c.width);
    // the label's logit was read before the first barrier, and is overwritten behind it
    const RowSums sums = of_block(of_thread<A, VEC>(z, z_t, int(c.width)));
    const double mu = sums.product / sums.sum;
    if (threadIdx.x == 0) {
      // lse - z[label], mu - z_t[label]
      const double log_sum = ::log(sums.sum);
      static_cast<A*>(c.row)[row] = A(sums.top - z_label + log_sum);
      static_cast<A*>(c.lse)[row] = A(sums.top + log_sum);
      if (z_t != nullptr) {
        static_cast<A*>(c.row_t)[row] = A(mu - z_t_label);
        static_cast<A*>(c.mu)[row] = A(mu);
      }
    }
    if (c.wanted) write_bars<A, VEC>(c, row, A(sums.top), A(1 / sums.sum), A(mu));
  }
}

template <class A, int VEC>
__global__ void __launch_bounds__(THREADS, 1) cross_entropy_backward_kernel(const CrossEntropyBackward c) {
  for (Index row = blockIdx.x; row < c.rows; row += gridDim.x)
    write_bars<A, VEC>(c, row, number<A>(c.lse, row), A(1), number<A>(c.mu, row));
}

// Calls f(a null pointer to a logit, logits of a vector as a type, threads); logits are not half precision.
template <class F>
void by_vector(const char* kernel, const CrossEntropy& c, F f) {
  cuda::check_width(kernel, c.width);
  const Index warps = (c.width + WARP - 1) / WARP;
  const int threads = warps < THREADS / WARP ? int(warps) * WARP : THREADS;
  if (c.dtype == Dtype::float64)
    f(static_cast<double*>(nullptr), std::integral_constant<int, 1>{}, threads);
  else if (c.width % WHOLE<float> == 0 && aligned<float>(c.z) && aligned<float>(c.z_t))
    f(static_cast<float*>(nullptr), std::integral_constant<int, WHOLE<float>>{}, threads);
  else
    f(static_cast<float*>(nullptr), std::integral_constant<int, 1>{}, threads);
}

}  // namespace

namespace cuda {

void cross_entropy_forward(const CrossEntropyForward& c) {
  by_vector("cross_entropy_forward", c, [&](auto* type, auto vec, int threads) {
    launch("cross_entropy_forward",
           cross_entropy_forward_kernel<std::remove_pointer_t<decltype(type)>, decltype(vec)::value>, c.rows, threads,
           c);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& c) {
  by_vector("cross_entropy_backward", c, [&](auto* type, auto vec, int threads) {
    launch("cross_entropy_backward",
           cross_entropy_backward_kernel<std::remove_pointer_t<decltype(type)>, decltype(vec)::value>, c.rows, threads,
           c);
  });
}

}  // namespace cuda

}  // namespace gradmem
