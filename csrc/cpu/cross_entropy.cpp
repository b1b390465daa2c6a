// Rows of linear_cross_entropy on a CPU: one sweep over a row of logits for its statistics, and one that leaves their
// cotangents in the place of the logits. Formulas: csrc/common/softmax.h.

#include "../common/softmax.h"
#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace gradmem {
namespace {

// Elements that a task has: enough to be worth another thread.
constexpr Index TASK = 16384;
// Logits whose sums are added up in one precision before they join those of the row.
constexpr Index BLOCK = 2048;

template <class A>
class Rows {
 public:
  explicit Rows(const CrossEntropy& call) : c(call), dual(bool(call.z_t)) {}

  void forward(const CrossEntropyForward& f) {
    by_rows([&](Index i) {
      const Index label = c.label[i];
      const A *z = at(c.z, i), *z_t = dual ? at(c.z_t, i) : nullptr;
      const A z_label = z[label], z_t_label = dual ? z_t[label] : A(0);
      const RowSums sums = dual ? statistics<true>(z, z_t) : statistics<false>(z, z_t);
      const double mu = sums.product / sums.sum, log_sum = std::log(sums.sum);
      // lse - z[label], mu - z_t[label]
      array(f.row)[i] = A(sums.top - z_label + log_sum);
      array(c.lse)[i] = A(sums.top + log_sum);
      if (dual) {
        array(f.row_t)[i] = A(mu - z_t_label);
        array(c.mu)[i] = A(mu);
      }
      if (f.wanted) write_bars(i, A(sums.top), A(1 / sums.sum), A(mu));
    });
  }

  void backward() {
    by_rows([&](Index i) { write_bars(i, array(c.lse)[i], A(1), dual ? array(c.mu)[i] : A(0)); });
  }

 private:
  static A* array(void* t) { return static_cast<A*>(t); }
  static A* at(const View<1>& t, Index i) { return static_cast<A*>(t.data) + i * t.strides[0]; }

  template <class F>
  void by_rows(F f) {
    const Index together = TASK / c.width > 1 ? TASK / c.width : 1;
    parallel_for((c.rows + together - 1) / together, c.threads, [&](Index task) {
      for (Index i = task * together; i < c.rows && i < (task + 1) * together; ++i) f(i);
    });
  }

  template <bool DUAL>
  RowSums statistics(const A* z, const A* z_t) const {
    RowSums row{-__builtin_inf(), 0, 0};
    for (Index first = 0; first < c.width; first += BLOCK) {
      const Index count = c.width - first < BLOCK ? c.width - first : BLOCK;
      row = joined(row, of_block<DUAL>(z + first, DUAL ? z_t + first : nullptr, count));
    }
    return row;
  }

  template <bool DUAL>
  static RowSums of_block(const A* z, const A* z_t, Index count) {
    Vec<A> largest_lanes = all(z[0]);
    by_vectors<A>(count, [&](Index j, auto n) {
      const Vec<A> v = in_row(z + j, n, z[0]);
      largest_lanes = v > largest_lanes ? v : largest_lanes;
    });
    const A top = largest<A>(largest_lanes), base = top == -A(__builtin_inf()) ? A(0) : top;
    Vec<A> total{}, product{};
    by_vectors<A>(count, [&](Index j, auto n) {
      const Vec<A> e = keep(exp<A>(read(z + j, n) - base), n);
      total += e;
      if constexpr (DUAL) product += e * read(z_t + j, n);
    });
    return {top, sum<A>(total), sum<A>(product)};
  }

  // A vector of a row, with ``other`` beyond its end.
  static Vec<A> in_row(const A* p, Whole, A) { return read(p); }
  static Vec<A> in_row(const A* p, Index count, A other) {
    Vec<A> v = all(other);
    for (Index i = 0; i < count; ++i) v[i] = p[i];
    return v;
  }

  void write_bars(Index i, A base, A factor, A mu) {
    const A b = c.b == nullptr ? A(0) : array(c.b)[i], a = c.a == nullptr ? A(0) : array(c.a)[i];
    A *z = at(c.z, i), *z_t = dual && c.b != nullptr ? at(c.z_t, i) : nullptr;
    const Index label = c.label[i];
    // with the label's own: its logit is gone when the others are done
    const Vec<A> z_label = all(z[label]), z_t_label = z_t == nullptr ? Vec<A>{} : all(z_t[label]);
    if (z_t == nullptr) {
      by_vectors<A>(c.width, [&](Index j, auto n) {
        write(z + j, logit_bars(read(z + j, n), Vec<A>{}, A(0), base, factor, mu, a, b).dz_t, n);
      });
    } else {
      by_vectors<A>(c.width, [&](Index j, auto n) {
        const auto bars = logit_bars(read(z + j, n), read(z_t + j, n), A(0), base, factor, mu, a, b);
        write(z + j, bars.dz_t, n);
        write(z_t + j, bars.dz, n);
      });
    }
    const auto bars = logit_bars(z_label, z_t_label, A(1), base, factor, mu, a, b);
    z[label] = bars.dz_t[0];
    if (z_t != nullptr) z_t[label] = bars.dz[0];
  }

  const CrossEntropy& c;
  const bool dual;
};

template <class F>
void by_wide_dtype(Dtype dtype, F f) {
  dtype == Dtype::float64 ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

}  // namespace

namespace GRADMEM_ISA {

void cross_entropy_forward(const CrossEntropyForward& c) {
  by_wide_dtype(c.dtype, [&](auto* type) { Rows<std::remove_pointer_t<decltype(type)>>(c).forward(c); });
}

void cross_entropy_backward(const CrossEntropyBackward& c) {
  by_wide_dtype(c.dtype, [&](auto* type) { Rows<std::remove_pointer_t<decltype(type)>>(c).backward(); });
}

}  // namespace GRADMEM_ISA

}  // namespace gradmem
