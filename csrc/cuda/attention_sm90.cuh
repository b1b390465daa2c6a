// What the attention kernels for Hopper share. A block of threads has 128 rows to itself, and goes over the other side in
// tiles that TMA brings to shared memory: a block of queries over keys, a block of keys over queries. Products are
// WGMMA's.
#pragma once

// What the hardware does, first; a test has a CPU do it.
#ifndef GRADMEM_HARDWARE
#define GRADMEM_HARDWARE "hopper.cuh"
#endif
#include GRADMEM_HARDWARE

#include "../cpu/attention.h"
#include "common.cuh"
#include "tiles_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

// Tiles of the other side that are in shared memory: one is read while the next one comes.
constexpr int STAGES = 2;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f, INFINITE = __builtin_inff();

// (2, 2, N / 8) values of a thread, its place in C, as rows and columns: (2, N / 4).
template <class L>
__device__ auto as_rows(L layout) {
  static_assert(decltype(rank(layout))::value == 3 && decltype(size<1>(layout))::value == 1, "one tile of a warpgroup");
  return make_layout(get<0, 1>(layout), make_layout(get<0, 0>(layout), get<0, 2>(layout), get<2>(layout)));
}

// The same as A of the next product: (2, 2, 2), 1, N / 16.
template <class L>
__device__ auto as_operand(L layout) {
  const auto halves = logical_divide(get<0, 2>(layout), Shape<_2>{});
  return make_layout(make_layout(get<0, 0>(layout), get<0, 1>(layout), get<0, 0>(halves)), get<1>(layout),
                     coalesce(make_layout(get<0, 1>(halves), get<2>(layout))));
}

template <int OTHER, int D>
__device__ auto scores_fragment() {
  return partition_fragment_C(Scores<OTHER, D>{}, Shape<Int<OWN>, Int<OTHER>>{});
}
template <int OTHER, int D>
__device__ auto sums_fragment() {
  auto sums = partition_fragment_C(Sums<OTHER, D>{}, Shape<Int<OWN>, Int<D>>{});
  clear(sums);
  return sums;
}

// Where a thread's values of C [OWN, N] are: their row and column.
template <class Mma, int N>
__device__ auto places() {
  const auto all = Mma{}.get_slice(threadIdx.x).partition_C(make_identity_tensor(Shape<Int<OWN>, Int<N>>{}));
  return make_tensor(all.data(), as_rows(all.layout()));
}

// Scores as the operand of the next product.
template <class C>
__device__ auto rounded(const C& c) {
  auto out = make_tensor<T>(as_operand(c.layout()));
  const auto from = make_tensor(c.data(), out.layout());
  CUTE_UNROLL
  for (int i = 0; i < size(out); ++i) out(i) = T(from(i));
  return out;
}

// Over the four threads that share a row.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

// What is seen of a sample: its first valid rows and keys, of those a row sees the first ones.
struct Seen {
  int rows, keys, shift;  // a causal row i sees the keys j <= i + shift
  bool causal;

  __device__ int keys_of(int row) const {
    return row >= rows ? 0 : causal ? min(keys, max(0, row + 1 + shift)) : keys;
  }
  // The first row that sees key j, if any does.
  __device__ int first_row(int key) const { return causal ? max(0, key - shift) : 0; }
};

__device__ inline Seen seen(const Attention& c, int b) {
  const int rows = int(c.rows), keys = int(c.keys), valid = c.seqlens == nullptr ? keys : int(c.seqlens[b]);
  return {c.seqlens != nullptr && rows == keys ? min(rows, valid) : rows, min(keys, valid), keys - rows, c.causal};
}

// What a block of threads of a launch over rows is for: a head's own rows from ``first`` on, and the tiles of N keys that
// they see.
struct QueryBlock {
  int sample, head, kv_head, block, first, tiles;
};

template <int N>
__device__ QueryBlock query_block(const Attention& c, const Seen& see) {
  const int head = blockIdx.y, kv_head = head / (int(c.heads) / int(c.kv_heads));
  const int block = gridDim.x - 1 - blockIdx.x, first = block * OWN;  // causal rows see more the later they are
  const int last = min(first + OWN, see.rows) - 1;
  return {int(blockIdx.z), head, kv_head, block, first, last < first ? 0 : (see.keys_of(last) + N - 1) / N};
}

// Barriers that one arrival, with the bytes it announces, completes; for the whole block.
__device__ inline void start_barriers(Barrier::ValueType& own, Barrier::ValueType (&others)[STAGES]) {
  if (threadIdx.x == 0) {
    Barrier::init(&own, 1);
    for (auto& there : others) Barrier::init(&there, 1);
    fence_barriers();
  }
  __syncthreads();
}

// A thread's rows of sums [own, D], times a factor for each, where they are there.
template <int D, class C>
__device__ void write_rows(const C& sums, const float (&factor)[2], const View<3>& to, int b, int head, int first,
                           int rows) {
  const auto place = places<Sums<16, D>, D>();
  const auto values = make_tensor(sums.data(), as_rows(sums.layout()));
  T* base = static_cast<T*>(to.data) + b * to.strides[0] + head * to.strides[1];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = first + int(get<0>(place(i, 0)));
    if (row >= rows) continue;
    CUTE_UNROLL
    for (int j = 0; j < size<1>(values); j += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values(i, j) * factor[i], values(i, j + 1) * factor[i]);
      *reinterpret_cast<__nv_bfloat162*>(base + row * to.strides[2] + int(get<1>(place(i, j)))) = pair;
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace gradmem
