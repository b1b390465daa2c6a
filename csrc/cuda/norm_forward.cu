// rms_norm and layer_norm on CUDA, forward and dual forward. Formulas: csrc/common/norm.h, docs/rms_norm.md.

#include "../common/norm.h"
#include "kernels.h"
#include "rows.cuh"

namespace gradmem {
namespace {

// s = x + r, rounded as it is stored: what is normalised is what the backward kernel will find.
template <class T, class L>
__device__ inline void add_rows(Row<T, L>& x, const T* r, T* s, int width) {
  L::each(width, [&](int k, int column) {
    auto v = x(k, column);
    const auto v_r = read_if<L::VEC>(r, column);
    GRADMEM_UNROLL
    for (int e = 0; e < L::VEC; ++e) v.v[e] += v_r.v[e];
    const auto rounded = narrowed<T, L::VEC>(v);
    store<L::VEC>(s + column, rounded);
    x.keep(k, rounded);
  });
  x.move_to(s);
}

template <class T, bool DUAL, class L>
__global__ void __launch_bounds__(L::THREADS, 1) norm_forward_kernel(const NormForward c) {
  using A = Wide<T>;
  constexpr int VEC = L::VEC;
  const int width = int(c.width);
  const T *w = static_cast<T*>(c.w), *w_t = static_cast<T*>(c.w_t);
  const T *bias = static_cast<T*>(c.c), *bias_t = static_cast<T*>(c.c_t);
  const bool centred = c.mean != nullptr;

  for (Index i = L::first_row(); i < c.rows; i += L::row_step()) {
    const Place place(i, c.inner);
    Row<T, L> x(place.of<T>(c.x), width), x_t(DUAL ? place.of<T>(c.x_t) : nullptr, width);
    if (T* s = place.of<T>(c.s, width)) add_rows(x, place.of<T>(c.r), s, width);
    if constexpr (DUAL)
      if (T* s_t = place.of<T>(c.s_t, width)) add_rows(x_t, place.of<T>(c.r_t), s_t, width);

    A means[2] = {};  // of x and x_t
    if (centred) {
      L::each(width, [&](int k, int column) {
        const auto v = x(k, column), v_t = x_t(k, column);
        GRADMEM_UNROLL
        for (int e = 0; e < VEC; ++e) {
          means[0] += v.v[e];
          if constexpr (DUAL) means[1] += v_t.v[e];
        }
      });
      add_up<L>(means);
      means[0] /= A(width);
      means[1] /= A(width);
    }
    A sums[2] = {};  // of v * v and v * x_t, v = x - mean
    L::each(width, [&](int k, int column) {
      const auto v = x(k, column), v_t = x_t(k, column);
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        const A d = v.v[e] - means[0];
        sums[0] += d * d;
        if constexpr (DUAL) sums[1] += d * v_t.v[e];
      }
    });
    add_up<L>(sums);
    const A rstd = A(1) / Math<A>::sqrt(sums[0] / A(width) + A(c.eps)), xt_n = rstd * (sums[1] / A(width));

    T *y = place.of<T>(c.y, width), *y_t = DUAL ? place.of<T>(c.y_t, width) : nullptr;
    L::each(width, [&](int k, int column) {
      const auto v = x(k, column), v_t = x_t(k, column), weight = read_if<VEC>(w, column);
      const auto weight_t = read_if<VEC>(DUAL ? w_t : nullptr, column), shift = read_if<VEC>(bias, column);
      const auto shift_t = read_if<VEC>(DUAL ? bias_t : nullptr, column);
      Wides<T, VEC> out, out_t;
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        const A n = normalised(v.v[e], means[0], rstd);
        const A n_t = normalised_tangent(v_t.v[e], n, rstd, means[1], xt_n);
        const auto scaled_n = scaled(n, n_t, weight.v[e], weight_t.v[e], shift.v[e], shift_t.v[e]);
        out.v[e] = scaled_n.y;
        out_t.v[e] = scaled_n.y_t;
      }
      write_if<VEC>(y, column, out);
      if constexpr (DUAL) write_if<VEC>(y_t, column, out_t);
    });
    if (L::lane() == 0) {
      static_cast<A*>(c.rstd)[i] = rstd;
      if (centred) static_cast<A*>(c.mean)[i] = means[0];
    }
  }
}

template <class T>
bool whole_vectors(const NormForward& c) {
  bool whole = aligned<T>(c.x) && aligned<T>(c.x_t) && aligned<T>(c.r) && aligned<T>(c.r_t);
  for (const void* p : {c.w, c.w_t, c.c, c.c_t, c.y, c.y_t, c.s, c.s_t}) whole = whole && aligned(p);
  return whole;
}

}  // namespace

namespace cuda {
void norm_forward(const NormForward& c) {
  check_width("norm_forward", c.width);
  by_cuda_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    by_layout<T, 512>(c.width, whole_vectors<T>(c), [&](auto layout, int threads) {
      using L = decltype(layout);
      const Index blocks = (c.rows + L::TEAMS - 1) / L::TEAMS;
      launch("norm_forward", c.y_t != nullptr ? norm_forward_kernel<T, true, L> : norm_forward_kernel<T, false, L>,
             blocks, threads, c);
    });
  });
}
}  // namespace cuda

}  // namespace gradmem
