// The tiles of the attention kernels for Hopper, and the products of tiles that two warpgroups make together.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>

#include <cuda_bf16.h>

namespace gradmem {
namespace cuda {
namespace {

using namespace cute;
using T = cutlass::bfloat16_t;

// Rows that a block of threads has to itself, 64 for each warpgroup.
constexpr int OWN = 128, THREADS = 256;

// A tile [R, D] in shared memory, rows dense, and the same seen as [D, R].
template <int R, int D>
using Tile = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<R>, Int<D>>{}));
template <int R, int D>
using Turned = decltype(composition(Tile<R, D>{}, make_layout(Shape<Int<D>, Int<R>>{}, GenRowMajor{})));

// [own, other] = A B^T, both [rows, D] in shared memory.
template <int OTHER, int D>
using Scores = decltype(make_tiled_mma(
    GMMA::ss_op_selector<T, T, float, Shape<Int<OWN>, Int<OTHER>, Int<D>>, GMMA::Major::K, GMMA::Major::K>(),
    Layout<Shape<_2, _1, _1>>{}));
// [own, D] = A B, A [own, other] in registers, B [other, D] in shared memory.
template <int OTHER, int D>
using Sums = decltype(make_tiled_mma(
    GMMA::rs_op_selector<T, T, float, Shape<Int<OWN>, Int<D>, Int<OTHER>>, GMMA::Major::K, GMMA::Major::MN>(),
    Layout<Shape<_2, _1, _1>>{}));

}  // namespace
}  // namespace cuda
}  // namespace gradmem

