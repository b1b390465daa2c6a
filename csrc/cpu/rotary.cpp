// Rotary embedding on a CPU: one pass over x that turns pairs of channels (i, i + half). Formulas: docs/rotary.md.

#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace gradmem {
namespace {

// Elements that a task has: enough to be worth another thread.
constexpr Index TASK = 16384;

template <class T, class Table>
void run(const Rotary& c) {
  using A = Wide<T>;
  const Index at_most = TASK / (c.heads * c.d), together = at_most > 1 ? at_most : 1;
  const Index parts = (c.length + together - 1) / together;
  const Index rest = c.d - 2 * c.half;

  // position s of a sample in all heads, for which its angles are read once
  const auto turn = [&](Index b, Index s) {
    const Table* cos = static_cast<Table*>(c.cos.data) + b * c.cos.strides[0] + s * c.cos.strides[1];
    const Table* sin = static_cast<Table*>(c.sin.data) + b * c.sin.strides[0] + s * c.sin.strides[1];
    const auto at = [&](const View<3>& t, Index h) {
      return static_cast<T*>(t.data) + b * t.strides[0] + h * t.strides[1] + s * t.strides[2];
    };
    for (Index h = 0; h < c.heads; ++h) {
      const T* x = at(c.x, h);
      T* y = at(c.y, h);
      by_vectors<A>(c.half, [&](Index j, auto n) {
        const Vec<A> x1 = read(x + j, n), x2 = read(x + c.half + j, n), v_cos = read(cos + j, n);
        const Vec<A> v_sin = c.transposed ? -read(sin + j, n) : read(sin + j, n);
        // y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin
        write(y + j, x1 * v_cos - x2 * v_sin, n);
        write(y + c.half + j, x2 * v_cos + x1 * v_sin, n);
      });
      std::memcpy(static_cast<void*>(y + 2 * c.half), x + 2 * c.half, rest * sizeof(T));
    }
  };

  parallel_for(c.batch * parts, c.threads, [&](Index task) {
    const Index b = task / parts, first = task % parts * together;
    for (Index s = first; s < c.length && s < first + together; ++s) turn(b, s);
  });
}

}  // namespace

namespace GRADMEM_ISA {
void rotary(const Rotary& c) {
  by_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    c.table_dtype == c.dtype ? run<T, T>(c) : run<T, Wide<T>>(c);
  });
}
}  // namespace GRADMEM_ISA

}  // namespace gradmem
