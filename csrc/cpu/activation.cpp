// swiglu and gelu on a CPU: elements by vectors, each tensor read or written once. Formulas: csrc/common/activation.h.

#include <array>

#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace gradmem {
namespace {

// Elements that a task has: enough to be worth another thread.
constexpr Index TASK = 16384;

template <Form form>
constexpr bool GATED = form == Form::silu;

// y, y_t of x, up, x_t, up_t, for a whole number of vectors.
//
// The compiler decides which product it fuses with a sum, and could decide otherwise in a copy of the function that is
// made for the end of a row: there is to be none, so that a result does not depend on where its element lies.
template <Form form, bool DUAL, class T>
[[gnu::noipa]] void forward(const T* const* in, T* const* out, Index count) {
  using A = Wide<T>;
  const auto [x, up, x_t, up_t] = std::array{in[0], in[1], in[2], in[3]};
  const auto [y, y_t] = std::array{out[0], out[1]};
  for (Index j = 0; j < count; j += WIDTH<A>) {
    const Vec<A> v = read(x + j), gate = GATED<form> ? read(up + j) : all(A(1));
    if constexpr (DUAL) {
      const auto results = activate<form>(v, gate, read_if(x_t, j, Whole{}), read_if(up_t, j, Whole{}));
      write(y + j, results.y);
      write(y_t + j, results.y_t);
    } else {
      write(y + j, derivatives<form>(v).f * gate);
    }
  }
}

// dx, dx_t, dup, dup_t, y_t of x, up, x_t, up_t, a, b, likewise.
template <Form form, bool DUAL, class T>
[[gnu::noipa]] void backward(const T* const* in, T* const* out, Index count) {
  using A = Wide<T>;
  const auto [x, up, x_t, up_t, a, b] = std::array{in[0], in[1], in[2], in[3], in[4], in[5]};
  const auto [dx, dx_t, dup, dup_t, y_t] = std::array{out[0], out[1], out[2], out[3], out[4]};
  const auto tangent = [](const T* t, Index j) { return DUAL ? read_if(t, j, Whole{}) : Vec<A>{}; };
  for (Index j = 0; j < count; j += WIDTH<A>) {
    const Vec<A> gate = GATED<form> ? read(up + j) : all(A(1));
    const auto d = activation_cotangents<form>(read(x + j), gate, tangent(x_t, j),
                                               GATED<form> ? tangent(up_t, j) : Vec<A>{}, tangent(a, j), read(b + j));
    if constexpr (DUAL) {
      write_if(dx, j, d.dx, Whole{});
      write_if(y_t, j, d.y_t, Whole{});
    }
    write_if(dx_t, j, d.dx_t, Whole{});
    if constexpr (GATED<form>) {
      if constexpr (DUAL) write_if(dup, j, d.dup, Whole{});
      write_if(dup_t, j, d.dup_t, Whole{});
    }
  }
}

// run(in, out, count) on all elements of a row: the last ones, which do not fill a vector, in copies.
template <std::size_t IN, std::size_t OUT, class T, class F>
void on_row(F run, std::array<const T*, IN> in, std::array<T*, OUT> out, Index count) {
  constexpr Index width = WIDTH<Wide<T>>;
  const Index whole = count / width * width, rest = count - whole;
  if (whole > 0) run(in.data(), out.data(), whole);
  if (rest == 0) return;
  T from[IN][width] = {}, to[OUT][width];
  std::array<T*, OUT> ends = out;
  for (std::size_t i = 0; i < IN; ++i)
    if (in[i] != nullptr) {
      std::memcpy(static_cast<void*>(from[i]), in[i] + whole, rest * sizeof(T));
      in[i] = from[i];
    }
  for (std::size_t i = 0; i < OUT; ++i)
    if (out[i] != nullptr) out[i] = to[i];
  run(in.data(), out.data(), width);
  for (std::size_t i = 0; i < OUT; ++i)
    if (out[i] != nullptr) std::memcpy(static_cast<void*>(ends[i] + whole), to[i], rest * sizeof(T));
}

// run(in, out, count) on all elements, by tasks.
template <class T, std::size_t IN, std::size_t OUT, class F>
void by_tasks(const Activation& c, F run, const std::array<View<1>, IN>& inputs,
              const std::array<void*, OUT>& results) {
  const Index parts = (c.width + TASK - 1) / TASK, together = TASK / c.width > 1 ? TASK / c.width : 1;
  const Index groups = (c.rows + together - 1) / together;
  parallel_for(groups * parts, c.threads, [&](Index task) {
    const Index first = task / parts * together, column = task % parts * TASK;
    const Index last = first + together < c.rows ? first + together : c.rows;
    const Index count = c.width - column < TASK ? c.width - column : TASK;
    for (Index r = first; r < last; ++r) {
      std::array<const T*, IN> in;
      std::array<T*, OUT> out;
      for (std::size_t i = 0; i < IN; ++i)
        in[i] = inputs[i] ? static_cast<T*>(inputs[i].data) + r * inputs[i].strides[0] + column : nullptr;
      for (std::size_t i = 0; i < OUT; ++i)
        out[i] = results[i] == nullptr ? nullptr : row<T>(results[i], r, c.width) + column;
      on_row(run, in, out, count);
    }
  });
}

// Calls f with the form as a type: f(std::integral_constant<Form, form>{}).
template <class F>
void by_form(Form form, F f) {
  switch (form) {
    case Form::silu:
      return f(std::integral_constant<Form, Form::silu>{});
    case Form::gelu:
      return f(std::integral_constant<Form, Form::gelu>{});
    case Form::gelu_tanh:
      return f(std::integral_constant<Form, Form::gelu_tanh>{});
  }
}

}  // namespace

namespace GRADMEM_ISA {

void activation_forward(const ActivationForward& c) {
  by_dtype(c.dtype, [&](auto* type) {
    by_form(c.form, [&](auto form) {
      using T = std::remove_pointer_t<decltype(type)>;
      by_tasks<T, 4, 2>(c, c.y_t != nullptr ? forward<form(), true, T> : forward<form(), false, T>,
                        {c.x, c.up, c.x_t, c.up_t}, {c.y, c.y_t});
    });
  });
}

void activation_backward(const ActivationBackward& c) {
  by_dtype(c.dtype, [&](auto* type) {
    by_form(c.form, [&](auto form) {
      using T = std::remove_pointer_t<decltype(type)>;
      const bool dual = c.dx != nullptr || c.dup != nullptr || c.y_t != nullptr;
      by_tasks<T, 6, 5>(c, dual ? backward<form(), true, T> : backward<form(), false, T>,
                        {c.x, c.up, c.x_t, c.up_t, c.a, c.b}, {c.dx, c.dx_t, c.dup, c.dup_t, c.y_t});
    });
  });
}

}  // namespace GRADMEM_ISA

}  // namespace gradmem
