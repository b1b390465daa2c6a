// swiglu and gelu on CUDA: elements by vectors, each tensor read or written once. Formulas: csrc/common/activation.h.

#include "common.cuh"
#include "kernels.h"

namespace gradmem {
namespace {

constexpr int THREADS = 128;

// A vector of each tensor that a thread has; parts of rows are shared out among blocks, ``tiles`` of a row.
template <int VEC>
struct Spot {
  Index row, column;

  template <class T>
  __device__ const T* of(const View<1>& t) const {
    return t.data == nullptr ? nullptr : static_cast<const T*>(t.data) + row * t.strides[0] + column;
  }
  template <class T>
  __device__ T* of(void* dense, Index width) const {
    return dense == nullptr ? nullptr : static_cast<T*>(dense) + row * width + column;
  }
};

// f(spot) for all vectors of this thread.
template <int VEC, class F>
__device__ inline void by_spots(const Activation& c, Index tiles, F f) {
  for (Index tile = blockIdx.x; tile < c.rows * tiles; tile += gridDim.x) {
    const Spot<VEC> spot{tile / tiles, (tile % tiles * THREADS + threadIdx.x) * VEC};
    if (spot.column < c.width) f(spot);
  }
}

template <Form form>
constexpr bool GATED = form == Form::silu;

template <int VEC, bool GATED, class T>
__device__ inline Wides<T, VEC> gate_of(const T* up) {
  if constexpr (GATED) {
    return widened(load<VEC>(up));
  } else {
    Wides<T, VEC> ones;
    GRADMEM_UNROLL
    for (int e = 0; e < VEC; ++e) ones.v[e] = 1;
    return ones;
  }
}

template <Form form, bool DUAL, class T, int VEC>
__global__ void __launch_bounds__(THREADS) activation_forward_kernel(const ActivationForward c, Index tiles) {
  by_spots<VEC>(c, tiles, [&](const Spot<VEC>& at) {
    const auto x = widened(load<VEC>(at.template of<T>(c.x)));
    const auto gate = gate_of<VEC, GATED<form>>(at.template of<T>(c.up));
    const auto x_t = read_if<VEC>(DUAL ? at.template of<T>(c.x_t) : nullptr, 0);
    const auto up_t = read_if<VEC>(DUAL && GATED<form> ? at.template of<T>(c.up_t) : nullptr, 0);
    Wides<T, VEC> y, y_t;
    GRADMEM_UNROLL
    for (int e = 0; e < VEC; ++e) {
      const auto out = activate<form>(x.v[e], gate.v[e], x_t.v[e], up_t.v[e]);
      y.v[e] = out.y;
      y_t.v[e] = out.y_t;
    }
    write_if<VEC>(at.template of<T>(c.y, c.width), 0, y);
    if constexpr (DUAL) write_if<VEC>(at.template of<T>(c.y_t, c.width), 0, y_t);
  });
}

template <Form form, bool DUAL, class T, int VEC>
__global__ void __launch_bounds__(THREADS) activation_backward_kernel(const ActivationBackward c, Index tiles) {
  by_spots<VEC>(c, tiles, [&](const Spot<VEC>& at) {
    const auto x = widened(load<VEC>(at.template of<T>(c.x)));
    const auto gate = gate_of<VEC, GATED<form>>(at.template of<T>(c.up));
    const auto x_t = read_if<VEC>(DUAL ? at.template of<T>(c.x_t) : nullptr, 0);
    const auto up_t = read_if<VEC>(DUAL && GATED<form> ? at.template of<T>(c.up_t) : nullptr, 0);
    const auto a = read_if<VEC>(DUAL ? at.template of<T>(c.a) : nullptr, 0);
    const auto b = widened(load<VEC>(at.template of<T>(c.b)));
    Wides<T, VEC> dx, dx_t, dup, dup_t, y_t;
    GRADMEM_UNROLL
    for (int e = 0; e < VEC; ++e) {
      const auto d = activation_cotangents<form>(x.v[e], gate.v[e], x_t.v[e], up_t.v[e], a.v[e], b.v[e]);
      dx.v[e] = d.dx;
      dx_t.v[e] = d.dx_t;
      dup.v[e] = d.dup;
      dup_t.v[e] = d.dup_t;
      y_t.v[e] = d.y_t;
    }
    if constexpr (DUAL) {
      write_if<VEC>(at.template of<T>(c.dx, c.width), 0, dx);
      if constexpr (GATED<form>) write_if<VEC>(at.template of<T>(c.dup, c.width), 0, dup);
      write_if<VEC>(at.template of<T>(c.y_t, c.width), 0, y_t);
    }
    write_if<VEC>(at.template of<T>(c.dx_t, c.width), 0, dx_t);
    if constexpr (GATED<form>) write_if<VEC>(at.template of<T>(c.dup_t, c.width), 0, dup_t);
  });
}

// Calls f(form, elements of a vector), both as types, for these views and dense results.
template <class T, class F>
void by_form(const Activation& c, std::initializer_list<View<1>> views, std::initializer_list<const void*> results,
             F f) {
  bool whole = sizeof(T) < sizeof(double) && c.width % WHOLE<T> == 0;
  for (const View<1>& t : views) whole = whole && aligned<T>(t);
  for (const void* p : results) whole = whole && aligned(p);
  const auto by_vector = [&](auto form) {
    if constexpr (sizeof(T) < sizeof(double))
      if (whole) return f(form, std::integral_constant<int, WHOLE<T>>{});
    f(form, std::integral_constant<int, 1>{});
  };
  switch (c.form) {
    case Form::silu:
      return by_vector(std::integral_constant<Form, Form::silu>{});
    case Form::gelu:
      return by_vector(std::integral_constant<Form, Form::gelu>{});
    case Form::gelu_tanh:
      return by_vector(std::integral_constant<Form, Form::gelu_tanh>{});
  }
}

template <class Arguments>
void run(const char* name, void (*kernel)(const Arguments, Index), int vector, const Arguments& c) {
  const Index tiles = (c.width + THREADS * vector - 1) / (THREADS * vector);
  cuda::launch(name, kernel, c.rows * tiles, THREADS, c, tiles);
}

}  // namespace

namespace cuda {

void activation_forward(const ActivationForward& c) {
  by_cuda_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    by_form<T>(c, {c.x, c.up, c.x_t, c.up_t}, {c.y, c.y_t}, [&](auto form, auto vec) {
      constexpr Form f = decltype(form)::value;
      constexpr int VEC = decltype(vec)::value;
      run("activation_forward", c.y_t != nullptr ? activation_forward_kernel<f, true, T, VEC>
                                                 : activation_forward_kernel<f, false, T, VEC>, VEC, c);
    });
  });
}

void activation_backward(const ActivationBackward& c) {
  const bool dual = c.dx != nullptr || c.dup != nullptr || c.y_t != nullptr;
  by_cuda_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto launch_for = [&](auto form, auto vec) {
      constexpr Form f = decltype(form)::value;
      constexpr int VEC = decltype(vec)::value;
      run("activation_backward",
          dual ? activation_backward_kernel<f, true, T, VEC> : activation_backward_kernel<f, false, T, VEC>, VEC, c);
    };
    by_form<T>(c, {c.x, c.up, c.x_t, c.up_t, c.a, c.b}, {c.dx, c.dx_t, c.dup, c.dup_t, c.y_t}, launch_for);
  });
}

}  // namespace cuda

}  // namespace gradmem
