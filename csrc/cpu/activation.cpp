// swiglu and gelu on a CPU: elements by vectors, each tensor read or written once. Formulas: csrc/common/activation.h.

#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace gradmem {
namespace {

// Elements that a task has: enough to be worth another thread.
constexpr Index TASK = 16384;

// A part of a row: its place in a tensor.
template <class T>
inline T* at(const View<1>& t, Index row, Index column) {
  return t ? static_cast<T*>(t.data) + row * t.strides[0] + column : nullptr;
}

// f(row, first column, columns) for parts of rows, by tasks.
template <class F>
void by_tasks(const Activation& c, F f) {
  const Index parts = (c.width + TASK - 1) / TASK, together = TASK / c.width > 1 ? TASK / c.width : 1;
  const Index groups = (c.rows + together - 1) / together;
  parallel_for(groups * parts, c.threads, [&](Index task) {
    const Index first = task / parts * together, column = task % parts * TASK;
    const Index last = first + together < c.rows ? first + together : c.rows;
    const Index count = c.width - column < TASK ? c.width - column : TASK;
    for (Index row = first; row < last; ++row) f(row, column, count);
  });
}

template <Form form>
constexpr bool GATED = form == Form::silu;

template <Form form, bool DUAL, class T>
void forward(const ActivationForward& c) {
  using A = Wide<T>;
  by_tasks(c, [&](Index r, Index column, Index count) {
    const T *x = at<T>(c.x, r, column), *up = at<T>(c.up, r, column);
    const T *x_t = at<T>(c.x_t, r, column), *up_t = at<T>(c.up_t, r, column);
    T *y = row<T>(c.y, r, c.width) + column, *y_t = DUAL ? row<T>(c.y_t, r, c.width) + column : nullptr;
    by_vectors<A>(count, [&](Index j, auto n) {
      const Vec<A> gate = GATED<form> ? read(up + j, n) : all(A(1));
      if constexpr (DUAL) {
        const auto out = activate<form>(read(x + j, n), gate, read_if(x_t, j, n), read_if(up_t, j, n));
        write(y + j, out.y, n);
        write(y_t + j, out.y_t, n);
      } else {
        write(y + j, derivatives<form>(read(x + j, n)).f * gate, n);
      }
    });
  });
}

template <Form form, bool DUAL, class T>
void backward(const ActivationBackward& c) {
  using A = Wide<T>;
  by_tasks(c, [&](Index r, Index column, Index count) {
    const T *x = at<T>(c.x, r, column), *up = at<T>(c.up, r, column), *x_t = at<T>(c.x_t, r, column);
    const T *up_t = at<T>(c.up_t, r, column), *a = at<T>(c.a, r, column), *b = at<T>(c.b, r, column);
    const auto result = [&](void* t) { return t == nullptr ? nullptr : row<T>(t, r, c.width) + column; };
    T *dx = result(c.dx), *dx_t = result(c.dx_t), *dup = result(c.dup), *dup_t = result(c.dup_t), *y_t = result(c.y_t);
    by_vectors<A>(count, [&](Index j, auto n) {
      const Vec<A> none{}, gate = GATED<form> ? read(up + j, n) : all(A(1));
      const auto out = activation_cotangents<form>(
          read(x + j, n), gate, DUAL ? read_if(x_t, j, n) : none, DUAL && GATED<form> ? read_if(up_t, j, n) : none,
          DUAL ? read_if(a, j, n) : none, read(b + j, n));
      if constexpr (DUAL) {
        write_if(dx, j, out.dx, n);
        if constexpr (GATED<form>) write_if(dup, j, out.dup, n);
        write_if(y_t, j, out.y_t, n);
      }
      write_if(dx_t, j, out.dx_t, n);
      if constexpr (GATED<form>) write_if(dup_t, j, out.dup_t, n);
    });
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
      c.y_t != nullptr ? forward<form(), true, T>(c) : forward<form(), false, T>(c);
    });
  });
}

void activation_backward(const ActivationBackward& c) {
  by_dtype(c.dtype, [&](auto* type) {
    by_form(c.form, [&](auto form) {
      using T = std::remove_pointer_t<decltype(type)>;
      const bool dual = c.dx != nullptr || c.dup != nullptr || c.y_t != nullptr;
      dual ? backward<form(), true, T>(c) : backward<form(), false, T>(c);
    });
  });
}

}  // namespace GRADMEM_ISA

}  // namespace gradmem
