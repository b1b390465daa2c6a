// In the place of csrc/cuda/hopper.cuh, for tests on machines without a GPU: a CPU does what TMA and WGMMA do, on CuTe's
// layouts of tiles and of the values that each thread has. What is not tested so: descriptors, barriers, asynchrony.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "block.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace cuda_on_cpu {

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const dim3& grid = config->gridDim;
  // as CUDA refuses them
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  Block::get().run({grid.x, grid.y, grid.z}, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

// CUDA's own is there too, for what follows it is this one.
#define cudaLaunchKernelEx cuda_on_cpu::launch

#include "../../cuda/common.cuh"
#include "../../cuda/tiles_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

using std::max;
using std::min;

// Whoever waits waits for the whole block, whose first thread has loaded.
struct Barrier {
  using ValueType = int;
  static void init(int*, int) {}
  static void arrive_and_expect_tx(int*, unsigned) {}
  static void wait(int*, int) { __syncthreads(); }
};
inline void fence_barriers() {}

// As much as a block may have.
constexpr std::size_t SHARED_BYTES = 227 * 1024;

inline char* shared_memory() {
  alignas(1024) static char memory[SHARED_BYTES];
  return memory;
}

template <int R, int D>
struct Load {
  View<3> from;
  Index batch, heads, rows;
};

template <int R, int D>
Load<R, D> make_load(const View<3>& t, Index batch, Index heads, Index rows) {
  if (batch < 1 || heads < 1 || rows < 1) throw std::invalid_argument("TMA: a tensor without elements");
  return {t, batch, heads, rows};
}

template <int R, int D>
void load_tile(const Load<R, D>& load, int batch, int heads, int rows, int b, int head, int i, T* to, int*) {
  if (batch != load.batch || heads != load.heads || rows != load.rows || b >= batch || head >= heads) std::abort();
  const T* base = static_cast<const T*>(load.from.data) + b * load.from.strides[0] + head * load.from.strides[1];
  auto tile = make_tensor(make_smem_ptr(to), Tile<R, D>{});
  for (int r = 0; r < R; ++r)
    for (int d = 0; d < D; ++d) tile(r, d) = i * R + r < rows ? base[(i * R + r) * load.from.strides[2] + d] : T(0.0f);
}

// Adds to a thread's values of C, at the places that Mma gives it.
template <class Mma, int N, class C, class Sum>
void add_products(C& c, bool add, const Sum& sum) {
  const auto place = Mma{}.get_slice(threadIdx.x).partition_C(make_identity_tensor(Shape<Int<OWN>, Int<N>>{}));
  for (int i = 0; i < size(c); ++i) c(i) = (add ? c(i) : 0) + sum(int(get<0>(place(i))), int(get<1>(place(i))));
}

template <int OTHER, int D, class C>
void multiply_scores(const T* own, const T* other, C& c, bool add) {
  const auto a = make_tensor(make_smem_ptr(own), Tile<OWN, D>{});
  const auto b = make_tensor(make_smem_ptr(other), Tile<OTHER, D>{});
  add_products<Scores<OTHER, D>, OTHER>(c, add, [&](int m, int n) {
    float sum = 0;
    for (int d = 0; d < D; ++d) sum += float(a(m, d)) * float(b(n, d));
    return sum;
  });
}

template <int OTHER, int D, class A, class C>
void multiply_sums(const A& a, const T* other, C& c) {
  static float weights[OWN][OTHER];  // what all threads have of A
  const auto place = Sums<OTHER, D>{}.get_slice(threadIdx.x).partition_A(
      make_identity_tensor(Shape<Int<OWN>, Int<OTHER>>{}));
  static_assert(decltype(size<0>(a) == size<0>(place))::value && decltype(size<1>(a) == size<1>(place))::value &&
                decltype(size<2>(a) == size<2>(place))::value, "the operand of WGMMA");
  for (int i = 0; i < size(a); ++i) weights[int(get<0>(place(i)))][int(get<1>(place(i)))] = float(a(i));
  __syncthreads();
  const auto b = make_tensor(make_smem_ptr(other), Turned<OTHER, D>{});
  add_products<Sums<OTHER, D>, D>(c, true, [&](int m, int d) {
    float sum = 0;
    for (int n = 0; n < OTHER; ++n) sum += weights[m][n] * float(b(d, n));
    return sum;
  });
  __syncthreads();
}

template <class... C>
void begin(C&...) {}
template <class... C>
void wait(C&...) {}

template <class... Parameters, class... Arguments>
void launch_blocks(const char* name, void (*kernel)(Parameters...), Index rows, Index heads, Index batch, int bytes,
                   const Arguments&... arguments) {
  if (bytes > int(SHARED_BYTES)) std::abort();
  std::memset(shared_memory(), 0xff, SHARED_BYTES);  // NaN
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned((rows + OWN - 1) / OWN), unsigned(heads), unsigned(batch));
  config.blockDim = dim3(THREADS);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace
}  // namespace cuda
}  // namespace gradmem
