// Rows, and the teams of threads that work on them: a warp for a short row, a block for a long one. A thread keeps its
// elements of a row in registers where there is room, so that memory is read once; it reads them again otherwise.
#pragma once

#include "common.cuh"

namespace gradmem {
namespace {

constexpr int WARP = 32;
// Threads of a block, where the layout leaves it open.
constexpr int BLOCK = 256;

// VEC: elements of a vector. COUNT: vectors that each thread keeps. TEAM: threads of a team, a warp or a block. With
// zeros there are as many vectors as the row has, and a team is a block of as many threads as were launched.
template <int VEC_, int COUNT_, int TEAM_>
struct Layout {
  static constexpr int VEC = VEC_, COUNT = COUNT_, TEAM = TEAM_;
  static constexpr int THREADS = COUNT == 0 || TEAM == WARP ? BLOCK : TEAM;
  static constexpr int TEAMS = TEAM == WARP ? BLOCK / WARP : 1;  // of a block
  static constexpr int KEPT = COUNT > 0 ? COUNT : 1;
  static constexpr int COLUMNS = TEAM * VEC * COUNT;  // of the widest row that is kept

  __device__ static int threads() { return COUNT == 0 ? int(blockDim.x) : TEAM; }
  __device__ static int lane() { return TEAMS == 1 ? int(threadIdx.x) : int(threadIdx.x) % TEAM; }
  __device__ static int team() { return TEAMS == 1 ? 0 : int(threadIdx.x) / TEAM; }
  __device__ static Index first_row() { return Index(blockIdx.x) * TEAMS + team(); }
  __device__ static Index row_step() { return Index(gridDim.x) * TEAMS; }

  // f(k, column) for this thread's vectors of a row, k their number among those that are kept.
  template <class F>
  __device__ static void each(int width, F f) {
    if constexpr (COUNT > 0) {
      GRADMEM_UNROLL
      for (int k = 0; k < COUNT; ++k) {
        const int column = (lane() + k * TEAM) * VEC;
        if (column < width) f(k, column);
      }
    } else {
      for (int column = lane() * VEC; column < width; column += threads() * VEC) f(0, column);
    }
  }
};

// A thread's elements of a row; of no row they are zeros.
template <class T, class L>
class Row {
 public:
  __device__ Row(const T* row, int width) : row_(row) {
    if constexpr (L::COUNT > 0)
      if (row != nullptr) L::each(width, [&](int k, int column) { kept_[k] = load<L::VEC>(row + column); });
  }

  __device__ Wides<T, L::VEC> operator()(int k, int column) const {
    if (row_ == nullptr) return {};
    return widened(L::COUNT > 0 ? kept_[k] : load<L::VEC>(row_ + column));
  }

  // Elements, and where they are, in the place of what was read.
  __device__ void keep(int k, const Pack<T, L::VEC>& elements) { kept_[k] = elements; }
  __device__ void move_to(const T* row) { row_ = row; }

 private:
  const T* row_;
  Pack<T, L::VEC> kept_[L::KEPT];
};

// Row i of tensors that lie as as_rows() of gradmem_kernels/operators/rows.py says.
struct Place {
  Index i, outer, inner;

  __device__ Place(Index row, Index rows_of_inner)
      : i(row), outer(row / rows_of_inner), inner(row % rows_of_inner) {}

  template <class T>
  __device__ T* of(const View<2>& t) const {
    return t.data == nullptr ? nullptr : static_cast<T*>(t.data) + outer * t.strides[0] + inner * t.strides[1];
  }
  template <class T>
  __device__ T* of(void* dense, Index width) const {
    return dense == nullptr ? nullptr : static_cast<T*>(dense) + i * width;
  }
};

// Sums over the team, in an order that does not depend on the timing; every thread of the team gets them.
template <class L, class A, int N>
__device__ inline void add_up(A (&sums)[N]) {
  GRADMEM_UNROLL
  for (int n = 0; n < N; ++n)
    GRADMEM_UNROLL
    for (int distance = WARP / 2; distance > 0; distance /= 2)
      sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], distance);
  if constexpr (L::TEAMS == 1) {
    __shared__ A of_warps[N][32];
    const int warp = int(threadIdx.x) / WARP, warps = (L::threads() + WARP - 1) / WARP;
    __syncthreads();  // the sums before these have been read
    if (threadIdx.x % WARP == 0) {
      GRADMEM_UNROLL
      for (int n = 0; n < N; ++n) of_warps[n][warp] = sums[n];
    }
    __syncthreads();
    GRADMEM_UNROLL
    for (int n = 0; n < N; ++n) {
      sums[n] = 0;
      for (int w = 0; w < warps; ++w) sums[n] += of_warps[n][w];
    }
  }
}

// Calls f(layout, threads) with the layout for rows of this width, which keeps no longer rows than a team of MOST
// threads has room for. float64, which is for tests, has no vectors.
template <class T, int MOST, class F>
void by_layout(Index width, bool whole_vectors, F f) {
  constexpr int VEC = WHOLE<T>;
  if constexpr (sizeof(T) < sizeof(double)) {
    if (whole_vectors && width % VEC == 0) {
      if constexpr (MOST >= 32)
        if (width <= Layout<VEC, 2, 32>::COLUMNS) return f(Layout<VEC, 2, 32>{}, BLOCK);
      if constexpr (MOST >= 128)
        if (width <= Layout<VEC, 2, 128>::COLUMNS) return f(Layout<VEC, 2, 128>{}, 128);
      if constexpr (MOST >= 256)
        if (width <= Layout<VEC, 2, 256>::COLUMNS) return f(Layout<VEC, 2, 256>{}, 256);
      if constexpr (MOST >= 512)
        if (width <= Layout<VEC, 2, 512>::COLUMNS) return f(Layout<VEC, 2, 512>{}, 512);
      return f(Layout<VEC, 0, 0>{}, BLOCK);
    }
  }
  const Index threads = (width + WARP - 1) / WARP * WARP;
  f(Layout<1, 0, 0>{}, threads < BLOCK ? int(threads) : BLOCK);
}

}  // namespace
}  // namespace gradmem
