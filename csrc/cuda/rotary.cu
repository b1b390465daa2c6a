// Rotary embedding on CUDA: one pass over x that turns pairs of channels (i, i + half). Formulas: docs/rotary.md.

#include "common.cuh"
#include "kernels.h"

namespace gradmem {
namespace {

constexpr int THREADS = 256;

// A thread has VEC pairs of one position in all heads, for which it reads their angles once; or VEC of the channels
// that pass through. ``spots`` is how many threads a position takes.
template <class T, class Table, int VEC>
__global__ void __launch_bounds__(THREADS) rotary_kernel(const Rotary c, Index spots) {
  for (Index i = Index(blockIdx.x) * THREADS + threadIdx.x; i < c.batch * c.length * spots;
       i += Index(gridDim.x) * THREADS) {
    const Index j = i % spots * VEC, s = i / spots % c.length, sample = i / spots / c.length;
    const auto at = [&](const View<3>& t, Index head) {
      return static_cast<T*>(t.data) + sample * t.strides[0] + head * t.strides[1] + s * t.strides[2];
    };
    if (j >= c.half) {
      const Index rest = j + c.half;
      for (Index head = 0; head < c.heads; ++head) store<VEC>(at(c.y, head) + rest, load<VEC>(at(c.x, head) + rest));
      continue;
    }
    const auto angle = [&](const View<2>& table) {
      Wides<T, VEC> out;
      const Table* from = static_cast<Table*>(table.data) + sample * table.strides[0] + s * table.strides[1] + j;
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) out.v[e] = wide(from[e]);
      return out;
    };
    const auto cos = angle(c.cos), sin = angle(c.sin);
    for (Index head = 0; head < c.heads; ++head) {
      const T* x = at(c.x, head);
      const auto x1 = widened(load<VEC>(x + j)), x2 = widened(load<VEC>(x + c.half + j));
      Wides<T, VEC> y1, y2;
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        // y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin
        const auto v_sin = c.transposed ? -sin.v[e] : sin.v[e];
        y1.v[e] = x1.v[e] * cos.v[e] - x2.v[e] * v_sin;
        y2.v[e] = x2.v[e] * cos.v[e] + x1.v[e] * v_sin;
      }
      T* y = at(c.y, head);
      store<VEC>(y + j, narrowed<T, VEC>(y1));
      store<VEC>(y + c.half + j, narrowed<T, VEC>(y2));
    }
  }
}

template <class T, class Table, int VEC>
void run(const Rotary& c) {
  const Index spots = c.half / VEC + (c.d - 2 * c.half) / VEC;
  cuda::launch("rotary", rotary_kernel<T, Table, VEC>, (c.batch * c.length * spots + THREADS - 1) / THREADS, THREADS, c,
               spots);
}

}  // namespace

namespace cuda {
void rotary(const Rotary& c) {
  by_cuda_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Float = Wide<T>;
    if constexpr (sizeof(T) < sizeof(double)) {
      constexpr int VEC = WHOLE<T>;
      if (aligned<T>(c.x) && aligned<T>(c.y) && c.half % VEC == 0 && c.d % VEC == 0)
        return c.table_dtype == c.dtype ? run<T, T, VEC>(c) : run<T, Float, VEC>(c);
    }
    c.table_dtype == c.dtype ? run<T, T, 1>(c) : run<T, Float, 1>(c);
  });
}
}  // namespace cuda

}  // namespace gradmem
