// What CUDA kernels share: where they run, how they are launched, and how elements are read and written. A kernel takes
// the arguments of its namesake on a CPU (csrc/cpu). Names as in gradmem_kernels/triton: _t are tangents, d cotangents.
#pragma once

#include <cuda_runtime.h>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../common/value.h"
#include "target.h"

namespace gradmem {

namespace cuda {

// As many blocks as are wanted; kernels go over the rest of their work in strides of the grid.
constexpr Index MOST_BLOCKS = 1 << 30;

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Index blocks, int threads, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS));
  config.blockDim = dim3(unsigned(threads));
  config.stream = target().stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), (std::string("launch of ") + name).c_str());
}

}  // namespace cuda

namespace {

struct Half {
  std::uint16_t bits;
};

template <>
struct WideOf<Half> {
  using type = float;
};

// Calls f with a null pointer to the type of the tensors' elements.
template <class F>
void by_cuda_dtype(Dtype dtype, F f) {
  dtype == FLOAT16 ? f(static_cast<Half*>(nullptr)) : by_dtype(dtype, f);
}

__device__ inline float wide(float x) { return x; }
__device__ inline double wide(double x) { return x; }
#if defined(__CUDACC__)
__device__ inline float wide(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ inline float wide(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline void narrow_to(BFloat16& y, float x) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void narrow_to(Half& y, float x) { y.bits = __half_as_ushort(__float2half_rn(x)); }
#else  // in the tests that run kernels on a CPU
inline float wide(BFloat16 x) { return widened(x); }
inline float wide(Half x) {
  _Float16 y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline void narrow_to(BFloat16& y, float x) { narrow(x, &y); }
inline void narrow_to(Half& y, float x) {
  const _Float16 narrowed = x;
  std::memcpy(&y, &narrowed, sizeof y);
}
#endif
__device__ inline void narrow_to(float& y, float x) { y = x; }
__device__ inline void narrow_to(double& y, double x) { y = x; }

// Elements that a thread reads at once, by one instruction.
template <class T, int VEC>
struct alignas(VEC * sizeof(T)) Pack {
  T v[VEC];
};
// As many as the widest access has.
template <class T>
constexpr int WHOLE = 16 / int(sizeof(T));

template <class T, int VEC>
struct Wides {
  Wide<T> v[VEC];
};

template <class T, int VEC>
__device__ inline Wides<T, VEC> widened(const Pack<T, VEC>& p) {
  Wides<T, VEC> out;
  GRADMEM_UNROLL
  for (int e = 0; e < VEC; ++e) out.v[e] = wide(p.v[e]);
  return out;
}

template <class T, int VEC>
__device__ inline Pack<T, VEC> narrowed(const Wides<T, VEC>& w) {
  Pack<T, VEC> out;
  GRADMEM_UNROLL
  for (int e = 0; e < VEC; ++e) narrow_to(out.v[e], w.v[e]);
  return out;
}

template <int VEC, class T>
__device__ inline Pack<T, VEC> load(const T* p) {
  return *reinterpret_cast<const Pack<T, VEC>*>(p);
}

template <int VEC, class T>
__device__ inline void store(T* p, const Pack<T, VEC>& pack) {
  *reinterpret_cast<Pack<T, VEC>*>(p) = pack;
}

// A known zero where there is no tensor; and where nobody asked for a result, nothing.
template <int VEC, class T>
__device__ inline Wides<T, VEC> read_if(const T* p, Index at) {
  return p == nullptr ? Wides<T, VEC>{} : widened(load<VEC>(p + at));
}

template <int VEC, class T>
__device__ inline void write_if(T* p, Index at, const Wides<T, VEC>& w) {
  if (p != nullptr) store<VEC>(p + at, narrowed<T, VEC>(w));
}

// Whether vectors of 16 bytes can be read from this address on, and at these distances; of no tensor too.
inline bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }
template <class T, int N>
bool aligned(const View<N>& t) {
  bool all = aligned(t.data);
  for (Index stride : t.strides) all = all && stride % WHOLE<T> == 0;
  return all;
}

}  // namespace
}  // namespace gradmem
