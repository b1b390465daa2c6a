// rms_norm and layer_norm on a CPU: cotangents of inputs and tangents, and y_t, as far as asked for. A row is gone over
// twice, for its means and for its results, and read from memory once. Formulas: csrc/common/norm.h.
//
// Sums over rows are those of chunks of rows, each in the order of its rows, added up in the order of chunks. What a
// chunk is depends on the shape alone.

#include "../common/norm.h"
#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace gradmem {
namespace {

// Elements of a chunk at least, and chunks at most.
constexpr Index CHUNK = 16384, CHUNKS = 64;
// Columns that a task adds up.
constexpr Index COLUMNS = 1024;

template <class T, bool DUAL>
class Backward {
 public:
  using A = Wide<T>;

  explicit Backward(const NormBackward& call)
      : c(call), width(call.width), padded((width + WIDTH<A> - 1) / WIDTH<A> * WIDTH<A>) {
    const Index most = (c.rows + CHUNKS - 1) / CHUNKS, least = CHUNK / width;
    chunk = most > least ? most : least > 1 ? least : 1;
    chunks = (c.rows + chunk - 1) / chunk;
    sums = int(c.dw != nullptr) + int(c.dw_t != nullptr) + int(c.dc != nullptr) + int(c.dc_t != nullptr);
  }

  void run() {
    if (sums > 0) partial.reserve(chunks * sums * padded * sizeof(A), 1);
    totals = sums > 0 ? partial.take<A>(chunks * sums * padded) : nullptr;
    parallel_for(chunks, c.threads, [&](Index part) {
      A* next = totals + part * sums * padded;
      for (Index i = 0; i < sums * padded; ++i) next[i] = 0;
      const auto take = [&](void* wanted) {
        A* mine = wanted == nullptr ? nullptr : next;
        next += wanted == nullptr ? 0 : padded;
        return mine;
      };
      A *dw = take(c.dw), *dw_t = take(c.dw_t), *dc = take(c.dc), *dc_t = take(c.dc_t);
      for (Index i = part * chunk; i < c.rows && i < (part + 1) * chunk; ++i) one_row(i, dw, dw_t, dc, dc_t);
    });
    if (sums > 0) add_up();
  }

 private:
  void one_row(Index i, A* dw, A* dw_t, A* dc, A* dc_t) {
    const T *x = row<T>(c.x, i, c.inner), *b = row<T>(c.b, i, c.inner), *w = static_cast<T*>(c.w);
    const T *x_t = DUAL ? row<T>(c.x_t, i, c.inner) : nullptr, *a = DUAL ? row<T>(c.a, i, c.inner) : nullptr;
    const T *w_t = DUAL ? static_cast<T*>(c.w_t) : nullptr, *c_t = DUAL ? static_cast<T*>(c.c_t) : nullptr;
    const T *g = row<T>(c.g, i, c.inner), *h = row<T>(c.h, i, c.inner);
    T *dx = row<T>(c.dx, i, width), *dx_t = row<T>(c.dx_t, i, width), *y_t = row<T>(c.y_t, i, width);
    const A rstd = static_cast<A*>(c.rstd)[i], mean = c.mean == nullptr ? A(0) : static_cast<A*>(c.mean)[i];

    NormSums<Vec<A>> total{};
    by_vectors<A>(width, [&](Index j, auto n) {
      // zeros in b, a and x_t leave no trace of what is beyond the row's end, unless it is infinite
      const Vec<A> v = keep(normalised(read(x + j, n), mean, rstd), n);
      if constexpr (DUAL)
        add_norm_sums(total, v, read_if(x_t, j, n), read_if(a, j, n), read(b + j, n), read(w + j, n),
                      read_if(w_t, j, n));
      else
        add_plain_norm_sums(total, v, read(b + j, n), read(w + j, n));
    });
    const auto of = [&](Vec<A> v) { return sum<A>(v) / A(width); };
    NormSums<A> means{of(total.dn_1), of(total.dn_n),  of(total.dnt_1), of(total.dnt_n),
                      of(total.xt_1), of(total.xt_n), of(total.xt_dnt)};
    if (c.mean == nullptr) means.dn_1 = means.dnt_1 = means.xt_1 = 0;

    by_vectors<A>(width, [&](Index j, auto n) {
      const Vec<A> v = normalised(read(x + j, n), mean, rstd), v_b = read(b + j, n), v_w = read(w + j, n);
      Vec<A> v_dx_t, v_dw_t = v_b * v;
      if constexpr (DUAL) {
        const Vec<A> v_a = read_if(a, j, n);
        const auto d = norm_cotangents(means, rstd, v, read_if(x_t, j, n), v_a, v_b, v_w, read_if(w_t, j, n),
                                       read_if(c_t, j, n));
        v_dx_t = d.dx_t;
        if (dx != nullptr) write(dx + j, d.dx + read_if(g, j, n), n);
        write_if(y_t, j, d.y_t, n);
        add(dw, j, d.dw);
        add(dc, j, v_a);
      } else {
        v_dx_t = plain_norm_cotangent(means, rstd, v, v_b, v_w);
      }
      if (dx_t != nullptr) write(dx_t + j, v_dx_t + read_if(h, j, n), n);
      add(dw_t, j, v_dw_t);
      add(dc_t, j, v_b);
    });
  }

  static void add(A* total, Index j, Vec<A> v) {
    if (total != nullptr) store(total + j, load(total + j) + v);
  }

  void add_up() {
    const Index parts = (width + COLUMNS - 1) / COLUMNS;
    T* const results[] = {static_cast<T*>(c.dw), static_cast<T*>(c.dw_t), static_cast<T*>(c.dc),
                          static_cast<T*>(c.dc_t)};
    int place = 0;
    for (T* result : results) {
      if (result == nullptr) continue;
      const A* first = totals + place++ * padded;
      parallel_for(parts, parts > 1 ? c.threads : 1, [&](Index part) {
        const Index column = part * COLUMNS, count = width - column < COLUMNS ? width - column : COLUMNS;
        by_vectors<A>(count, [&](Index j, auto n) {
          Vec<A> total{};
          for (Index i = 0; i < chunks; ++i) total += load(first + i * sums * padded + column + j);
          write(result + column + j, total, n);
        });
      });
    }
  }

  const NormBackward& c;
  const Index width, padded;  // padded to whole vectors
  Index chunk, chunks;
  int sums;
  Scratch partial;
  A* totals = nullptr;  // [chunks, sums, padded], sums in the order dw, dw_t, dc, dc_t
};

}  // namespace

namespace GRADMEM_ISA {
void norm_backward(const NormBackward& c) {
  by_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // without these results there is neither a tangent nor an a
    const bool dual = c.dx != nullptr || c.y_t != nullptr || c.dw != nullptr || c.dc != nullptr;
    dual ? Backward<T, true>(c).run() : Backward<T, false>(c).run();
  });
}
}  // namespace GRADMEM_ISA

}  // namespace gradmem
