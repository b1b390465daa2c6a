// rms_norm and layer_norm on a CPU, forward and dual forward. A row is read from memory once: the first pass over it
// leaves it in the cache for those that follow. Formulas: csrc/common/norm.h.

#include "../common/norm.h"
#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace gradmem {
namespace {

// Elements that a task has: enough to be worth another thread.
constexpr Index TASK = 16384;

// s = x + r, rounded as it is stored: what is normalised is what the backward kernel will find.
template <class T>
void add_rows(Index width, const T* x, const T* r, T* s) {
  by_vectors<Wide<T>>(width, [&](Index j, auto n) { write(s + j, read(x + j, n) + read_if(r, j, n), n); });
}

// Sums over a row, and over its tangent.
template <class A>
struct Pair {
  Vec<A> of_x, of_tangent;

  friend Pair operator+(Pair a, Pair b) { return {a.of_x + b.of_x, a.of_tangent + b.of_tangent}; }
};

template <class T, bool DUAL>
void forward(const NormForward& c) {
  using A = Wide<T>;
  const T *w = static_cast<T*>(c.w), *w_t = static_cast<T*>(c.w_t);
  const T *bias = static_cast<T*>(c.c), *bias_t = static_cast<T*>(c.c_t);
  const Index width = c.width, together = TASK / width > 1 ? TASK / width : 1;

  const auto run = [&](Index i) {
    const T *x = row<T>(c.x, i, c.inner), *x_t = row<T>(c.x_t, i, c.inner);
    T *y = row<T>(c.y, i, width), *y_t = row<T>(c.y_t, i, width);
    if (T* s = row<T>(c.s, i, width)) {
      add_rows(width, x, row<T>(c.r, i, c.inner), s);
      x = s;
    }
    if (T* s_t = row<T>(c.s_t, i, width)) {
      add_rows(width, x_t, row<T>(c.r_t, i, c.inner), s_t);
      x_t = s_t;
    }
    A mean = 0, mean_t = 0;
    if (c.mean != nullptr) {
      const auto total = sum_of_vectors<A, Pair<A>>(width, [&](Pair<A>& add, Index j, auto n) {
        add.of_x += read(x + j, n);
        if constexpr (DUAL) add.of_tangent += read_if(x_t, j, n);
      });
      mean = sum<A>(total.of_x) / A(width);
      mean_t = sum<A>(total.of_tangent) / A(width);
    }
    // of squares, and of products with the tangent
    const auto total = sum_of_vectors<A, Pair<A>>(width, [&](Pair<A>& add, Index j, auto n) {
      const Vec<A> v = keep(read(x + j, n) - mean, n);
      add.of_x += v * v;
      if constexpr (DUAL) add.of_tangent += v * read_if(x_t, j, n);
    });
    const A rstd = 1 / std::sqrt(sum<A>(total.of_x) / A(width) + A(c.eps));
    const A xt_n = rstd * (sum<A>(total.of_tangent) / A(width));
    by_vectors<A>(width, [&](Index j, auto n) {
      const Vec<A> v = normalised(read(x + j, n), mean, rstd), weight = read(w + j, n), shift = read_if(bias, j, n);
      if constexpr (DUAL) {
        const Vec<A> v_t = x_t == nullptr ? Vec<A>{} : normalised_tangent(read(x_t + j, n), v, rstd, mean_t, xt_n);
        const auto out = scaled(v, v_t, weight, read_if(w_t, j, n), shift, read_if(bias_t, j, n));
        write(y + j, out.y, n);
        write(y_t + j, out.y_t, n);
      } else {
        write(y + j, v * weight + shift, n);
      }
    });
    static_cast<A*>(c.rstd)[i] = rstd;
    if (c.mean != nullptr) static_cast<A*>(c.mean)[i] = mean;
  };

  parallel_for((c.rows + together - 1) / together, c.threads, [&](Index task) {
    for (Index i = task * together; i < c.rows && i < (task + 1) * together; ++i) run(i);
  });
}

}  // namespace

namespace GRADMEM_ISA {
void norm_forward(const NormForward& c) {
  by_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    c.y_t != nullptr ? forward<T, true>(c) : forward<T, false>(c);
  });
}
}  // namespace GRADMEM_ISA

}  // namespace gradmem
