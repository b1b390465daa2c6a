// rms_norm and layer_norm on CUDA: cotangents of inputs and tangents, and y_t, as far as asked for. Formulas:
// csrc/common/norm.h, docs/rms_norm.md.
//
// Sums over rows are those of blocks, each in the order of its rows, added up by another kernel in the order of blocks.
// How many blocks there are depends on the shape and the device, so that results are the same in every call.

#include "../common/norm.h"
#include "kernels.h"
#include "rows.cuh"

namespace gradmem {
namespace {

// Of a call: whether there are tangents or an a.
bool is_dual(const NormBackward& c) {
  return c.dx != nullptr || c.y_t != nullptr || c.dw != nullptr || c.dc != nullptr;
}

// What a block adds up of one sum over rows: kept by threads where they keep their elements, else in the workspace.
template <class A, class L>
class Total {
 public:
  // Row of the workspace, null where the sum is not wanted.
  __device__ Total(A* row, int width) : row_(row), width_(width) {
    if (L::COUNT == 0 && row != nullptr)
      L::each(width, [&](int, int column) {
        GRADMEM_UNROLL
        for (int e = 0; e < L::VEC; ++e) row[column + e] = 0;
      });
  }

  __device__ void add(int k, int column, int e, A value) {
    if constexpr (L::COUNT > 0)
      kept_[k][e] += value;
    else if (row_ != nullptr)
      row_[column + e] += value;
  }

  // The kept ones to the workspace, those of the block's teams in their order.
  __device__ void finish() {
    if constexpr (L::COUNT > 0) {
      __shared__ A of_teams[L::TEAMS > 1 ? L::COLUMNS : 1];
      if (row_ == nullptr) return;
      for (int team = 0; team < L::TEAMS; ++team) {
        if (L::team() == team)
          L::each(width_, [&](int k, int column) {
            A* const to = team == L::TEAMS - 1 ? row_ : of_teams;
            GRADMEM_UNROLL
            for (int e = 0; e < L::VEC; ++e) to[column + e] = (team > 0 ? of_teams[column + e] : A(0)) + kept_[k][e];
          });
        if (L::TEAMS > 1) __syncthreads();
      }
    }
  }

 private:
  A* row_;
  int width_;
  A kept_[L::KEPT][L::VEC] = {};
};

template <class T, bool DUAL, bool SUMS, class L>
__global__ void __launch_bounds__(L::THREADS, 1) norm_backward_kernel(const NormBackward c, void* workspace) {
  using A = Wide<T>;
  constexpr int VEC = L::VEC;
  const int width = int(c.width);
  const T *w = static_cast<T*>(c.w), *w_t = DUAL ? static_cast<T*>(c.w_t) : nullptr;
  const T* c_t = DUAL ? static_cast<T*>(c.c_t) : nullptr;

  A* next = static_cast<A*>(workspace);  // [sums, blocks, width]
  const auto of_block = [&](const void* wanted) -> A* {
    if (!SUMS || wanted == nullptr) return nullptr;
    A* const row = next + Index(blockIdx.x) * width;
    next += Index(gridDim.x) * width;
    return row;
  };
  // where threads keep sums, there are either those of weights or those of their tangents (see below)
  constexpr bool BOTH = L::COUNT == 0;
  Total<A, L> dw(of_block(BOTH || DUAL ? c.dw : nullptr), width);
  Total<A, L> dw_t(of_block(BOTH || !DUAL ? c.dw_t : nullptr), width);
  Total<A, L> dc(of_block(BOTH || DUAL ? c.dc : nullptr), width);
  Total<A, L> dc_t(of_block(BOTH || !DUAL ? c.dc_t : nullptr), width);

  for (Index i = L::first_row(); i < c.rows; i += L::row_step()) {
    const Place place(i, c.inner);
    const Row<T, L> x(place.of<T>(c.x), width), b(place.of<T>(c.b), width);
    const Row<T, L> x_t(DUAL ? place.of<T>(c.x_t) : nullptr, width), a(DUAL ? place.of<T>(c.a) : nullptr, width);
    const A rstd = static_cast<A*>(c.rstd)[i], mean = c.mean == nullptr ? A(0) : static_cast<A*>(c.mean)[i];

    NormSums<A> total{};
    L::each(width, [&](int k, int column) {
      const auto v_x = x(k, column), v_b = b(k, column), v_w = read_if<VEC>(w, column);
      const auto v_xt = x_t(k, column), v_a = a(k, column), v_wt = read_if<VEC>(w_t, column);
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        const A n = normalised(v_x.v[e], mean, rstd);
        if constexpr (DUAL)
          add_norm_sums(total, n, v_xt.v[e], v_a.v[e], v_b.v[e], v_w.v[e], v_wt.v[e]);
        else
          add_plain_norm_sums(total, n, v_b.v[e], v_w.v[e]);
      }
    });
    if constexpr (DUAL) {
      A sums[] = {total.dn_1, total.dn_n, total.dnt_1, total.dnt_n, total.xt_1, total.xt_n, total.xt_dnt};
      add_up<L>(sums);
      total = {sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6]};
    } else {
      A sums[] = {total.dnt_1, total.dnt_n};
      add_up<L>(sums);
      total.dnt_1 = sums[0];
      total.dnt_n = sums[1];
    }
    const A share = A(1) / A(width), of_ones = c.mean == nullptr ? A(0) : share;
    const NormSums<A> means{total.dn_1 * of_ones, total.dn_n * share, total.dnt_1 * of_ones, total.dnt_n * share,
                            total.xt_1 * of_ones, total.xt_n * share, total.xt_dnt * share};

    const T *g = place.of<T>(c.g), *h = place.of<T>(c.h);
    T *dx = place.of<T>(c.dx, width), *dx_t = place.of<T>(c.dx_t, width), *y_t = place.of<T>(c.y_t, width);
    L::each(width, [&](int k, int column) {
      const auto v_x = x(k, column), v_b = b(k, column), v_w = read_if<VEC>(w, column);
      const auto v_xt = x_t(k, column), v_a = a(k, column), v_wt = read_if<VEC>(w_t, column);
      const auto v_ct = read_if<VEC>(c_t, column), v_g = read_if<VEC>(DUAL ? g : nullptr, column);
      const auto v_h = read_if<VEC>(h, column);
      Wides<T, VEC> out, out_t, out_y;
      GRADMEM_UNROLL
      for (int e = 0; e < VEC; ++e) {
        const A n = normalised(v_x.v[e], mean, rstd);
        if constexpr (DUAL) {
          const auto d = norm_cotangents(means, rstd, n, v_xt.v[e], v_a.v[e], v_b.v[e], v_w.v[e], v_wt.v[e], v_ct.v[e]);
          out.v[e] = d.dx + v_g.v[e];
          out_t.v[e] = d.dx_t + v_h.v[e];
          out_y.v[e] = d.y_t;
          if constexpr (SUMS) {
            dw.add(k, column, e, d.dw);
            dc.add(k, column, e, v_a.v[e]);
          }
        } else {
          out_t.v[e] = plain_norm_cotangent(means, rstd, n, v_b.v[e], v_w.v[e]) + v_h.v[e];
        }
        if constexpr (SUMS && (BOTH || !DUAL)) {
          dw_t.add(k, column, e, v_b.v[e] * n);
          dc_t.add(k, column, e, v_b.v[e]);
        }
      }
      if constexpr (DUAL) {
        write_if<VEC>(dx, column, out);
        write_if<VEC>(y_t, column, out_y);
      }
      write_if<VEC>(dx_t, column, out_t);
    });
  }
  if constexpr (SUMS) {
    dw.finish();
    dw_t.finish();
    dc.finish();
    dc_t.finish();
  }
}

// Columns of a block, and threads that share the parts of one.
constexpr int SUM_COLUMNS = 32, SUM_SHARES = 8;

// The sums over parts, [parts, width] each, of as many sums as there are results: shares of them in their order.
struct Results {
  void* of[4];
};
template <class T>
__global__ void __launch_bounds__(SUM_COLUMNS* SUM_SHARES)
    sum_parts_kernel(const void* workspace, Results results, Index parts, Index width) {
  using A = Wide<T>;
  __shared__ A shares[SUM_SHARES][SUM_COLUMNS];
  const Index blocks = (width + SUM_COLUMNS - 1) / SUM_COLUMNS, sum = blockIdx.x / blocks;
  const int lane = int(threadIdx.x) % SUM_COLUMNS, share = int(threadIdx.x) / SUM_COLUMNS;
  const Index column = blockIdx.x % blocks * SUM_COLUMNS + lane;
  const A* from = static_cast<const A*>(workspace) + sum * parts * width + column;
  A total = 0;
  if (column < width)
    for (Index part = share; part < parts; part += SUM_SHARES) total += from[part * width];
  shares[share][lane] = total;
  __syncthreads();
  if (share > 0 || column >= width) return;
  for (int s = 1; s < SUM_SHARES; ++s) total += shares[s][lane];
  void* const result = sum == 0 ? results.of[0] : sum == 1 ? results.of[1] : sum == 2 ? results.of[2] : results.of[3];
  narrow_to(static_cast<T*>(result)[column], total);
}

template <class T>
bool whole_vectors(const NormBackward& c) {
  bool whole = true;
  for (const View<2>& t : {c.x, c.x_t, c.a, c.b, c.g, c.h}) whole = whole && aligned<T>(t);
  for (const void* p : {c.w, c.w_t, c.c_t, c.dx, c.dx_t, c.y_t}) whole = whole && aligned(p);
  return whole;
}

// MOST: threads whose registers hold a row and its sums, see by_layout().
template <class T, bool DUAL, bool SUMS, int MOST>
void run(const NormBackward& c) {
  by_layout<T, MOST>(c.width, whole_vectors<T>(c), [&](auto layout, int threads) {
    using L = decltype(layout);
    const Index blocks = SUMS ? cuda::target().parts : (c.rows + L::TEAMS - 1) / L::TEAMS;
    cuda::launch("norm_backward", norm_backward_kernel<T, DUAL, SUMS, L>, blocks, threads, c,
                 cuda::target().workspace);
  });
}

}  // namespace

namespace cuda {
void norm_backward(const NormBackward& c) {
  check_width("norm_backward", c.width);
  Results results{};
  int sums = 0;
  for (void* wanted : {c.dw, c.dw_t, c.dc, c.dc_t})
    if (wanted != nullptr) results.of[sums++] = wanted;
  by_cuda_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (!is_dual(c))
      sums > 0 ? run<T, false, true, 512>(c) : run<T, false, false, 512>(c);
    else if (sums == 0)
      run<T, true, false, 512>(c);
    else if (c.dw_t != nullptr || c.dc_t != nullptr)
      run<T, true, true, 0>(c);
    else
      run<T, true, true, 256>(c);
    if (sums > 0)
      launch("sum_parts", sum_parts_kernel<T>, sums * ((c.width + SUM_COLUMNS - 1) / SUM_COLUMNS),
             SUM_COLUMNS * SUM_SHARES, target().workspace, results, target().parts, c.width);
  });
}
}  // namespace cuda

}  // namespace gradmem
