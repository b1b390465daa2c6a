// inner_sgd on a CPU: the whole batch in one call. A task has some samples, or a part of one. Where norms are clipped,
// tasks first leave their shares of the samples' inner products, which are then added up in the order of the parts, so
// that results do not depend on threads. Formulas: csrc/common/sgd.h.

#include "../common/sgd.h"
#include "elements.h"
#include "kernels.h"
#include "parallel.h"

namespace gradmem {
namespace {

// Elements that a task has: enough to be worth another thread.
constexpr Index TASK = 16384;

// Sums of many terms into one number are kept in double.
template <class A>
struct Precise;
template <>
struct Precise<float> {
  typedef double Lanes __attribute__((vector_size(2 * VECTOR_BYTES)));
};
template <>
struct Precise<double> {
  using Lanes = Vec<double>;
};

template <class A>
struct Total {
  using Lanes = typename Precise<A>::Lanes;
  Lanes lanes = {};

  void add(Vec<A> v) { lanes += __builtin_convertvector(v, Lanes); }
  double sum() const {
    double total = 0;
    for (int i = 0; i < WIDTH<A>; ++i) total += lanes[i];
    return total;
  }
};

// Inner products of a sample; du and du_t are the cotangents of u and u_t.
enum Product { H_H, H_HT, H_DU, H_DUT, HT_DUT, PRODUCTS };

template <class T>
class Step {
 public:
  using A = Wide<T>;

  explicit Step(const InnerSGD& call)
      : c(call), grad(static_cast<T*>(c.grad)), grad_t(static_cast<T*>(c.grad_t)), parts((c.width + TASK - 1) / TASK) {
    const Index shares = c.batch * parts;
    memory.reserve((PRODUCTS * sizeof(A) + 2 * sizeof(double)) * shares, 3);
    products = memory.take<A>(PRODUCTS * shares);
    rates = memory.take<double>(shares);
    rates_t = memory.take<double>(shares);
  }

  void forward(const InnerSGDForward& f) {
    if (clips()) by_parts([&](Index sample, Index part) { multiply<1>(sample, part, nullptr, nullptr); });
    const T *m = static_cast<T*>(f.memory), *m_t = static_cast<T*>(f.memory_t);
    T *y = static_cast<T*>(f.y), *y_t = static_cast<T*>(f.y_t);
    by_parts([&](Index sample, Index part) {
      const auto [dot, clip] = clip_in(sample);
      by_elements(sample, part, [&, dot = dot, clip = clip](Index i, Index j, auto n) {
        const Vec<A> g = read_if(grad, i, n), h = value(g), u = clip.s * h, r = rate(c.rate, sample, j, n, A(c.lr));
        // y = M - lr * u,  y_t = M_t - lr * u_t - lr_t * u,  u_t = J h_t
        if (y != nullptr) write(y + i, read(m + i, n) - r * u, n);
        if (y_t == nullptr) return;
        const Vec<A> u_t = clip_jacobian(clip, h, tangent(g, i, n), dot[H_HT]);
        write(y_t + i, read_if(m_t, i, n) - r * u_t - rate(c.rate_t, sample, j, n, A(0)) * u, n);
      });
    });
  }

  void backward(const InnerSGDBackward& f) {
    const T *a = static_cast<T*>(f.a), *b = static_cast<T*>(f.b);
    T *dg = static_cast<T*>(f.dg), *dg_t = static_cast<T*>(f.dg_t);
    if (clips()) by_parts([&](Index sample, Index part) { multiply<2>(sample, part, a, b); });
    by_parts([&](Index sample, Index part) {
      const auto [dot, clip] = clip_in(sample);
      Total<A> total, total_t;
      by_elements(sample, part, [&, dot = dot, clip = clip](Index i, Index j, auto n) {
        const Vec<A> g = read_if(grad, i, n), h = value(g), h_t = tangent(g, i, n), s = slope(g);
        const Vec<A> v_a = read_if(a, i, n), v_b = read_if(b, i, n);
        const auto [du, du_t] = cotangents(sample, j, n, v_a, v_b);
        // dg = dh/dg * (J du + J_t du_t),  dg_t = dh/dg * J du_t
        if (dg != nullptr)
          write(dg + i, s * (clip_jacobian(clip, h, du, dot[H_DU]) +
                             clip_jacobian_tangent(clip, h, h_t, du_t, dot[H_DUT], dot[HT_DUT])), n);
        if (dg_t != nullptr) write(dg_t + i, s * clip_jacobian(clip, h, du_t, dot[H_DUT]), n);
        // dlr = -(a * u + b * u_t),  dlr_t = -b * u
        const Vec<A> u = clip.s * h, dr = -(v_a * u + v_b * clip_jacobian(clip, h, h_t, dot[H_HT])), dr_t = -v_b * u;
        collect(f.dr, total, i, dr, n);
        collect(f.dr_t, total_t, i, dr_t, n);
      });
      rates[sample * parts + part] = total.sum();
      rates_t[sample * parts + part] = total_t.sum();
    });
    if (c.rate && c.rate.strides[1] == 0) {
      add_up(f.dr, rates);
      add_up(f.dr_t, rates_t);
    }
  }

 private:
  struct Sample {
    A dot[PRODUCTS];
    Clip<A> clip;
  };
  struct Cotangents {
    Vec<A> du, du_t;
  };

  bool clips() const { return c.clip_norm < A(__builtin_inf()); }

  // f(sample, part), by tasks.
  template <class F>
  void by_parts(F f) {
    const Index together = TASK / c.width > 1 ? TASK / c.width : 1, groups = (c.batch + together - 1) / together;
    parallel_for(groups * parts, c.threads, [&](Index task) {
      const Index first = task / parts * together;
      for (Index sample = first; sample < c.batch && sample < first + together; ++sample) f(sample, task % parts);
    });
  }

  // f(place in the tensor, place in the sample, count) for the vectors of a part.
  template <class F>
  void by_elements(Index sample, Index part, F f) {
    const Index first = part * TASK, count = c.width - first < TASK ? c.width - first : TASK;
    by_vectors<A>(count, [&](Index j, auto n) { f(sample * c.width + first + j, first + j, n); });
  }

  // A part's shares of the inner products: those of forward (1), or all of them (2).
  template <int ORDER>
  void multiply(Index sample, Index part, const T* a, const T* b) {
    Vec<A> total[PRODUCTS] = {};
    by_elements(sample, part, [&](Index i, Index j, auto n) {
      const Vec<A> g = read_if(grad, i, n), h = value(g), h_t = tangent(g, i, n);
      total[H_H] += h * h;
      total[H_HT] += h * h_t;
      if constexpr (ORDER > 1) {
        const auto [du, du_t] = cotangents(sample, j, n, read_if(a, i, n), read_if(b, i, n));
        total[H_DU] += h * du;
        total[H_DUT] += h * du_t;
        total[HT_DUT] += h_t * du_t;
      }
    });
    for (int p = 0; p < PRODUCTS; ++p) products[(sample * parts + part) * PRODUCTS + p] = sum<A>(total[p]);
  }

  Sample clip_in(Index sample) const {
    Sample found = {};
    if (clips())
      for (Index part = 0; part < parts; ++part)
        for (int p = 0; p < PRODUCTS; ++p) found.dot[p] += products[(sample * parts + part) * PRODUCTS + p];
    found.clip = clip_of(found.dot[H_H], found.dot[H_HT], A(c.clip_norm));
    return found;
  }

  Vec<A> value(Vec<A> g) const { return c.clamp ? clamped(g, A(c.clip_value)) : g; }
  Vec<A> slope(Vec<A> g) const { return c.clamp ? clamp_slope(g, A(c.clip_value)) : all(A(1)); }

  // h_t = dh/dg * g_t
  template <class Count>
  Vec<A> tangent(Vec<A> g, Index i, Count n) const {
    return slope(g) * read_if(grad_t, i, n);
  }

  template <class Count>
  static Vec<A> rate(const View<2>& t, Index sample, Index j, Count n, A otherwise) {
    if (!t) return all(otherwise);
    const A* of_sample = static_cast<A*>(t.data) + sample * t.strides[0];
    return t.strides[1] == 0 ? all(*of_sample) : read(of_sample + j, n);
  }

  // du = -(lr * a + lr_t * b),  du_t = -lr * b
  template <class Count>
  Cotangents cotangents(Index sample, Index j, Count n, Vec<A> a, Vec<A> b) const {
    const Vec<A> r = rate(c.rate, sample, j, n, A(c.lr)), r_t = rate(c.rate_t, sample, j, n, A(0));
    return {-(r * a + r_t * b), -(r * b)};
  }

  // A term of the rate's cotangent: to its place, or to the part's sum.
  template <class Count>
  void collect(void* result, Total<A>& total, Index i, Vec<A> term, Count n) const {
    if (result == nullptr) return;
    if (c.rate.strides[1] == 0)
      total.add(keep(term, n));
    else
      write(static_cast<A*>(result) + i, term, n);
  }

  void add_up(void* result, const double* shares) const {
    if (result == nullptr) return;
    for (Index sample = 0; sample < c.batch; ++sample) {
      double total = 0;
      for (Index part = 0; part < parts; ++part) total += shares[sample * parts + part];
      static_cast<A*>(result)[sample] = A(total);
    }
  }

  const InnerSGD& c;
  const T *grad, *grad_t;
  const Index parts;  // of a sample
  Scratch memory;
  A* products;              // [batch, parts, PRODUCTS]
  double *rates, *rates_t;  // [batch, parts]
};

}  // namespace

namespace GRADMEM_ISA {

void inner_sgd_forward(const InnerSGDForward& c) {
  by_dtype(c.dtype, [&](auto* type) { Step<std::remove_pointer_t<decltype(type)>>(c).forward(c); });
}

void inner_sgd_backward(const InnerSGDBackward& c) {
  by_dtype(c.dtype, [&](auto* type) { Step<std::remove_pointer_t<decltype(type)>>(c).backward(c); });
}

}  // namespace GRADMEM_ISA

}  // namespace gradmem
