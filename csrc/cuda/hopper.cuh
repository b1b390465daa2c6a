// TMA and WGMMA for tiles.
#pragma once

#include <cutlass/arch/barrier.h>

#include "../cpu/tensor.h"
#include "common.cuh"
#include "tiles_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

using Barrier = cutlass::arch::ClusterTransactionBarrier;

// The block's shared memory, as much as it was launched with.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

__device__ inline void fence_barriers() { cutlass::arch::fence_barrier_init(); }

// How TMA reads a tensor [batch, heads, rows, D] in tiles. It asks for addresses and strides of whole 16 bytes, and for
// strides other than 0.
template <int R, int D>
auto make_load(const View<3>& t, Index batch, Index heads, Index rows) {
  const auto layout = make_layout(make_shape(int(rows), Int<D>{}, int(heads), int(batch)),
                                  make_stride(t.strides[2], _1{}, t.strides[1], t.strides[0]));
  return make_tma_copy(SM90_TMA_LOAD{}, make_tensor(make_gmem_ptr(static_cast<const T*>(t.data)), layout),
                       Tile<R, D>{}, Shape<Int<R>, Int<D>>{}, _1{});
}
template <int R, int D>
using Load = decltype(make_load<R, D>(View<3>{}, 1, 1, 1));

// Has TMA copy tile i of a head's rows; bar learns of its arrival. Rows that are not there become zeros.
template <int R, int D>
__device__ void load_tile(const Load<R, D>& load, int batch, int heads, int rows, int b, int head, int i, T* to,
                          Barrier::ValueType* bar) {
  const auto whole = load.get_tma_tensor(make_shape(rows, Int<D>{}, heads, batch));
  const auto tile = local_tile(whole(_, _, head, b), Shape<Int<R>, Int<D>>{}, make_coord(i, _0{}));
  auto shared = make_tensor(make_smem_ptr(to), Tile<R, D>{});
  auto [from_part, to_part] =
      tma_partition(load, _0{}, Layout<_1>{}, group_modes<0, 2>(shared), group_modes<0, 2>(tile));
  copy(load.with(*bar), from_part, to_part);
}

// C (+)= A B, started; C's registers are not to be touched before wait().
template <class Mma, class A, class B, class C>
__device__ void multiply(Mma mma, const A& a, const B& b, C& c, bool add) {
  mma.accumulate_ = add ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < size<2>(a); ++k) {
    gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
}

// Products of scores [own, other]: A and B in shared memory, [OWN, D] and [OTHER, D].
template <int OTHER, int D, class C>
__device__ void multiply_scores(const T* own, const T* other, C& c, bool add) {
  Scores<OTHER, D> mma;
  const auto part = mma.get_slice(threadIdx.x);
  const auto a = part.make_fragment_A(part.partition_A(make_tensor(make_smem_ptr(own), Tile<OWN, D>{})));
  const auto b = part.make_fragment_B(part.partition_B(make_tensor(make_smem_ptr(other), Tile<OTHER, D>{})));
  multiply(mma, a, b, c, add);
}

// Sums [own, D]: A [own, other] in registers, B [OTHER, D] in shared memory.
template <int OTHER, int D, class A, class C>
__device__ void multiply_sums(const A& a, const T* other, C& c) {
  Sums<OTHER, D> mma;
  const auto part = mma.get_slice(threadIdx.x);
  const auto b = part.make_fragment_B(part.partition_B(make_tensor(make_smem_ptr(other), Turned<OTHER, D>{})));
  multiply(mma, a, b, c, true);
}

// Products between begin() and wait() run together.
template <class... C>
__device__ void begin(C&... c) {
  (warpgroup_fence_operand(c), ...);
  warpgroup_arrive();
}
template <class... C>
__device__ void wait(C&... c) {
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  (warpgroup_fence_operand(c), ...);
}

// Runs a kernel on blocks of own rows of each head of each sample.
template <class... Parameters, class... Arguments>
void launch_blocks(const char* name, void (*kernel)(Parameters...), Index rows, Index heads, Index batch, int bytes,
                   const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned((rows + OWN - 1) / OWN), unsigned(heads), unsigned(batch));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = target().stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace
}  // namespace cuda
}  // namespace gradmem
