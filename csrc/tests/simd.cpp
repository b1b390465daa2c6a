// exp and tanh of simd.h against the C library's of more bits, over ranges and at what is special; and what moves lanes.

#include "../cpu/simd.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"

namespace gradmem {
namespace {

// Vectors of these values, each of them in every lane once.
template <class T, class F>
void each(const std::vector<T>& values, F f) {
  for (std::size_t start = 0; start < values.size(); ++start) {
    T in[WIDTH<T>], out[WIDTH<T>];
    for (int i = 0; i < WIDTH<T>; ++i) in[i] = values[(start + i) % values.size()];
    f(in, out);
  }
}

template <class T>
std::vector<T> range(double low, double high, int count) {
  std::vector<T> values;
  for (int i = 0; i <= count; ++i) values.push_back(T(low + (high - low) * i / count));
  return values;
}

// Tiny ones of both signs, down to the smallest that there is.
template <class T>
std::vector<T> tiny() {
  using limits = std::numeric_limits<T>;
  std::vector<T> values = {0, -T(0), limits::denorm_min(), -limits::denorm_min(), limits::min(), -limits::min(),
                           limits::min() / 8, -limits::min() / 8};
  for (T x = limits::min(); x < 1; x *= 3) values.push_back(x), values.push_back(-x);
  return values;
}

template <class T>
bool close(T got, long double expected, int units) {
  return std::fabs(got - expected) <= units * std::numeric_limits<T>::epsilon() * std::fabs(expected);
}

template <class T>
void check_exp(const std::vector<T>& values) {
  each(values, [](const T* in, T* out) {
    store(out, exp<T>(load(in)));
    for (int i = 0; i < WIDTH<T>; ++i) CHECK(close(out[i], std::exp((long double)in[i]), 2), "%a: %a", in[i], out[i]);
  });
}

template <class T>
void check_tanh(const std::vector<T>& values) {
  each(values, [](const T* in, T* out) {
    store(out, tanh<T>(load(in)));
    for (int i = 0; i < WIDTH<T>; ++i) CHECK(close(out[i], std::tanh((long double)in[i]), 4), "%a: %a", in[i], out[i]);
  });
}

template <class T>
void ranges() {
  for (double size : {1e-3, 1.0, 20.0, double(MOST_EXPONENT<T>)}) {
    const double low = std::fmax(-size, double(LEAST_EXPONENT<T>) + 1e-6);
    check_exp<T>(range<T>(low, size - 1e-6 * size, 20011));
    check_tanh<T>(range<T>(-size, size, 20011));
  }
  check_exp<T>(tiny<T>());
  check_tanh<T>(tiny<T>());
}

template <class T>
void specials() {
  using limits = std::numeric_limits<T>;
  const T inf = limits::infinity(), nan = limits::quiet_NaN(), large = limits::max();
  const std::vector<T> values = {inf, -inf, nan, large, -large, 0, T(1.5) * MOST_EXPONENT<T>,
                                 T(1.5) * LEAST_EXPONENT<T>};
  each(values, [](const T* in, T* out) {
    store(out, exp<T>(load(in)));
    for (int i = 0; i < WIDTH<T>; ++i) {
      const T x = in[i], y = out[i];
      CHECK(x != x ? y != y : y == (x == 0 ? T(1) : x > 0 ? limits::infinity() : T(0)), "exp(%g) = %g", x, y);
    }
    store(out, tanh<T>(load(in)));
    for (int i = 0; i < WIDTH<T>; ++i) {
      const T x = in[i], y = out[i];
      CHECK(x != x ? y != y : y == T((x > 0) - (x < 0)), "tanh(%g) = %g", x, y);
    }
  });
}

template <class T>
void reductions() {
  T in[WIDTH<T>];
  for (int i = 0; i < WIDTH<T>; ++i) in[i] = T(i * 7 % WIDTH<T> - 3);
  CHECK(sum<T>(load(in)) == WIDTH<T> * (WIDTH<T> - 1) / 2 - 3 * WIDTH<T>, "%g", sum<T>(load(in)));
  CHECK(largest<T>(load(in)) == WIDTH<T> - 4, "%g", largest<T>(load(in)));
}

template <class T>
void squares() {
  Vec<T> rows[WIDTH<T>];
  for (int i = 0; i < WIDTH<T>; ++i)
    for (int j = 0; j < WIDTH<T>; ++j) rows[i][j] = T(100 * i + j);
  transpose_square<T>(rows);
  for (int i = 0; i < WIDTH<T>; ++i)
    for (int j = 0; j < WIDTH<T>; ++j) CHECK(rows[i][j] == T(100 * j + i), "%d, %d: %g", i, j, double(rows[i][j]));
}

}  // namespace
}  // namespace gradmem

int main() {
  using namespace gradmem;
  return run({ranges<float>, ranges<double>, specials<float>, specials<double>, reductions<float>, reductions<double>,
              squares<float>, squares<double>});
}
