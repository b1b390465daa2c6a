// inner_sgd on CUDA: the whole batch, clip norms and update, in one launch. A block has a part of a sample. Where the
// sample's inner products are wanted, each of its blocks adds up all of them by itself: a sample that was read once is
// in the cache, nobody waits for anybody, and no result depends on the number of parts. Formulas: csrc/common/sgd.h,
// docs/inner_sgd.md.

#include "../common/sgd.h"
#include "kernels.h"
#include "rows.cuh"

namespace gradmem {
namespace {

// Threads of a block at most.
constexpr int THREADS = 512;
// Vectors that a thread has at least, and where a sample's inner products are wanted, its parts at most.
constexpr Index VECTORS = 2, PARTS = 8;

// Inner products of a sample. v and v_t are the cotangents of u and u_t: du = -(lr * a + lr_t * b) and du_t = -lr * b;
// or, where a sample has one rate, what the rates multiply: a and b.
enum Product { H_H, H_HT, H_V, H_VT, HT_VT, PRODUCTS };

template <class T, int VEC>
struct Step {
  using A = Wide<T>;
  using W = Wides<T, VEC>;

  const InnerSGD& c;
  const T *grad, *grad_t;
  Index sample;

  __device__ Step(const InnerSGD& call, Index of_sample)
      : c(call), grad(of(call.grad, of_sample)), grad_t(of(call.grad_t, of_sample)), sample(of_sample) {}

  __device__ const T* of(const void* t, Index row) const {
    return t == nullptr ? nullptr : static_cast<const T*>(t) + row * c.width;
  }
  __device__ T* result(void* t) const { return t == nullptr ? nullptr : static_cast<T*>(t) + sample * c.width; }

  __device__ A value(A g) const { return c.clamp ? clamped(g, A(c.clip_value)) : g; }
  __device__ A slope(A g) const { return c.clamp ? clamp_slope(g, A(c.clip_value)) : A(1); }

  // Whether a sample has one rate.
  __device__ bool even() const { return c.rate.data == nullptr || c.rate.strides[1] == 0; }

  __device__ static A rate(const View<2>& t, Index of_sample, Index column, A otherwise) {
    return t.data == nullptr ? otherwise
                             : static_cast<const A*>(t.data)[of_sample * t.strides[0] + column * t.strides[1]];
  }
  __device__ A lr(Index column) const { return rate(c.rate, sample, column, A(c.lr)); }
  __device__ A lr_t(Index column) const { return rate(c.rate_t, sample, column, A(0)); }

  // The sample's inner products with these cotangents, the same in all of its blocks.
  __device__ void multiply(A (&dot)[PRODUCTS], const T* a, const T* b) const {
    Layout<VEC, 0, 0>::each(int(c.width), [&](int, int column) {
      const W g = read_if<VEC>(grad, column), g_t = read_if<VEC>(grad_t, column);
      const W v_a = read_if<VEC>(a, column), v_b = read_if<VEC>(b, column);
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        const A h = value(g.v[e]), h_t = slope(g.v[e]) * g_t.v[e];
        A v = v_a.v[e], v_t = v_b.v[e];
        if (!even()) {
          const A r = lr(column + e);
          v = -(r * v + lr_t(column + e) * v_t);
          v_t = -(r * v_t);
        }
        dot[H_H] += h * h;
        dot[H_HT] += h * h_t;
        dot[H_V] += h * v;
        dot[H_VT] += h * v_t;
        dot[HT_VT] += h_t * v_t;
      }
    });
    add_up<Layout<VEC, 0, 0>>(dot);
  }
};

// f(sample, part) for what this block has, and f(column) for the part's vectors of this thread.
template <class F>
__device__ inline void by_parts(Index batch, Index parts, F f) {
  for (Index i = blockIdx.x; i < batch * parts; i += gridDim.x) f(i / parts, i % parts);
}
template <int VEC, class F>
__device__ inline void by_vectors(Index width, Index part, Index parts, F f) {
  const Index threads = blockDim.x;
  for (Index column = (part * threads + threadIdx.x) * VEC; column < width; column += parts * threads * VEC) f(column);
}

template <class T, int VEC>
__global__ void __launch_bounds__(THREADS, 1)
    inner_sgd_forward_kernel(const InnerSGDForward c, Index parts, bool clips) {
  using A = Wide<T>;
  by_parts(c.batch, parts, [&](Index sample, Index part) {
    const Step<T, VEC> step(c, sample);
    A dot[PRODUCTS] = {};
    if (clips) step.multiply(dot, nullptr, nullptr);
    const Clip<A> clip = clip_of(dot[H_H], dot[H_HT], A(c.clip_norm));
    const T *m = step.of(c.memory, sample), *m_t = step.of(c.memory_t, sample);
    T *y = step.result(c.y), *y_t = step.result(c.y_t);
    by_vectors<VEC>(c.width, part, parts, [&](Index column) {
      const auto g = read_if<VEC>(step.grad, column), g_t = read_if<VEC>(step.grad_t, column);
      auto next = read_if<VEC>(m, column), next_t = read_if<VEC>(m_t, column);
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        // y = M - lr * u,  y_t = M_t - lr * u_t - lr_t * u,  u_t = J h_t
        const A h = step.value(g.v[e]), u = clip.s * h, r = step.lr(column + e);
        const A u_t = clip_jacobian(clip, h, step.slope(g.v[e]) * g_t.v[e], dot[H_HT]);
        next.v[e] -= r * u;
        next_t.v[e] -= r * u_t + step.lr_t(column + e) * u;
      }
      write_if<VEC>(y, column, next);
      write_if<VEC>(y_t, column, next_t);
    });
  });
}

template <class T, int VEC>
__global__ void __launch_bounds__(THREADS, 1)
    inner_sgd_backward_kernel(const InnerSGDBackward c, Index parts, bool multiplies) {
  using A = Wide<T>;
  by_parts(c.batch, parts, [&](Index sample, Index part) {
    const Step<T, VEC> step(c, sample);
    const T *a = step.of(c.a, sample), *b = step.of(c.b, sample);
    A dot[PRODUCTS] = {};
    if (multiplies) step.multiply(dot, a, b);
    const Clip<A> clip = clip_of(dot[H_H], dot[H_HT], A(c.clip_norm));
    const bool even = step.even();
    if (even) {
      if (part == 0 && threadIdx.x == 0) {
        // dlr = -<a, u> - <b, u_t>,  dlr_t = -<b, u>
        if (c.dr != nullptr)
          static_cast<A*>(c.dr)[sample] =
              -(clip.s * (dot[H_V] + dot[HT_VT]) - clip.k * dot[H_HT] * dot[H_VT]);
        if (c.dr_t != nullptr) static_cast<A*>(c.dr_t)[sample] = -(clip.s * dot[H_VT]);
      }
      const A r = step.lr(0), r_t = step.lr_t(0);
      dot[H_V] = -(r * dot[H_V] + r_t * dot[H_VT]);
      dot[H_VT] = -(r * dot[H_VT]);
      dot[HT_VT] = -(r * dot[HT_VT]);
    }
    A* const dr = even || c.dr == nullptr ? nullptr : static_cast<A*>(c.dr) + sample * c.width;
    A* const dr_t = even || c.dr_t == nullptr ? nullptr : static_cast<A*>(c.dr_t) + sample * c.width;
    T *dg = step.result(c.dg), *dg_t = step.result(c.dg_t);
    by_vectors<VEC>(c.width, part, parts, [&](Index column) {
      const auto g = read_if<VEC>(step.grad, column), g_t = read_if<VEC>(step.grad_t, column);
      const auto v_a = read_if<VEC>(a, column), v_b = read_if<VEC>(b, column);
      Wides<T, VEC> out, out_t;
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        const A h = step.value(g.v[e]), s = step.slope(g.v[e]), h_t = s * g_t.v[e], r = step.lr(column + e);
        const A du = -(r * v_a.v[e] + step.lr_t(column + e) * v_b.v[e]), du_t = -(r * v_b.v[e]);
        // dg = dh/dg * (J du + J_t du_t),  dg_t = dh/dg * J du_t
        out.v[e] = s * (clip_jacobian(clip, h, du, dot[H_V]) +
                        clip_jacobian_tangent(clip, h, h_t, du_t, dot[H_VT], dot[HT_VT]));
        out_t.v[e] = s * clip_jacobian(clip, h, du_t, dot[H_VT]);
        // of each element: dlr = -(a * u + b * u_t),  dlr_t = -b * u
        const A u = clip.s * h;
        if (dr != nullptr)
          dr[column + e] = -(v_a.v[e] * u + v_b.v[e] * clip_jacobian(clip, h, h_t, dot[H_HT]));
        if (dr_t != nullptr) dr_t[column + e] = -(v_b.v[e] * u);
      }
      write_if<VEC>(dg, column, out);
      write_if<VEC>(dg_t, column, out_t);
    });
  });
}

int threads_of(const InnerSGD& c, int vector) {
  const Index warps = (c.width / vector + WARP - 1) / WARP;
  return warps < 1 ? WARP : warps < THREADS / WARP ? int(warps) * WARP : THREADS;
}

// Parts of a sample: enough to keep the device busy. Where each of them goes over the whole sample first, no more.
Index parts_of(const InnerSGD& c, int vector, bool multiplies) {
  const Index own = threads_of(c, vector) * vector * VECTORS, most = (c.width + own - 1) / own;
  if (!multiplies) return most;
  int multiprocessors = 1;
  GRADMEM_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, cuda::target().device));
  const Index few = (2 * multiprocessors + c.batch - 1) / c.batch, at_most = few < PARTS ? few : PARTS;
  return most < at_most ? most : at_most;
}

// Calls f(a null pointer to an element, elements of a vector as a type) for these dense tensors.
template <class F>
void by_vector(const char* kernel, const InnerSGD& c, std::initializer_list<const void*> tensors, F f) {
  cuda::check_width(kernel, c.width);
  by_cuda_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) < sizeof(double)) {
      bool whole = c.width % WHOLE<T> == 0 && aligned(c.grad) && aligned(c.grad_t);
      for (const void* p : tensors) whole = whole && aligned(p);
      if (whole) return f(type, std::integral_constant<int, WHOLE<T>>{});
    }
    f(type, std::integral_constant<int, 1>{});
  });
}

bool clips(const InnerSGD& c) { return c.clip_norm < __builtin_inf(); }

}  // namespace

namespace cuda {

void inner_sgd_forward(const InnerSGDForward& c) {
  by_vector("inner_sgd_forward", c, {c.memory, c.memory_t, c.y, c.y_t}, [&](auto* type, auto vec) {
    constexpr int VEC = decltype(vec)::value;
    const Index parts = parts_of(c, VEC, clips(c));
    launch("inner_sgd_forward", inner_sgd_forward_kernel<std::remove_pointer_t<decltype(type)>, VEC>, c.batch * parts,
           threads_of(c, VEC), c, parts, clips(c));
  });
}

void inner_sgd_backward(const InnerSGDBackward& c) {
  by_vector("inner_sgd_backward", c, {c.a, c.b, c.dg, c.dg_t}, [&](auto* type, auto vec) {
    constexpr int VEC = decltype(vec)::value;
    const bool of_rate = c.rate && c.rate.strides[1] == 0 && (c.dr != nullptr || c.dr_t != nullptr);
    const bool multiplies = clips(c) || of_rate;
    const Index parts = parts_of(c, VEC, multiplies);
    launch("inner_sgd_backward", inner_sgd_backward_kernel<std::remove_pointer_t<decltype(type)>, VEC>,
           c.batch * parts, threads_of(c, VEC), c, parts, multiplies);
  });
}

}  // namespace cuda

}  // namespace gradmem
