// Products of product.h against sums in the order of their depth, in more bits.

#include "../cpu/product.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"

namespace gradmem {
namespace {

// Small numbers that repeat late.
template <class T>
std::vector<T> numbers(std::ptrdiff_t count) {
  std::vector<T> values(count);
  unsigned state = 12345;
  for (T& x : values) state = state * 1664525u + 1013904223u, x = T(int(state >> 16) - 32768) / 32768;
  return values;
}

std::ptrdiff_t up(std::ptrdiff_t n, std::ptrdiff_t to) { return (n + to - 1) / to * to; }

template <class T>
void check(std::ptrdiff_t m, std::ptrdiff_t n, std::ptrdiff_t depth, bool transposed, bool add) {
  const std::ptrdiff_t all_m = up(m, PRODUCT_ROWS), all_n = up(n, WIDTH<T>), ldb = all_n + 3, ldc = all_n + 5;
  const std::ptrdiff_t rows = transposed ? 1 : depth, columns = transposed ? all_m : 1;
  const T canary = T(777);
  const std::vector<T> a = numbers<T>(all_m * depth), b = numbers<T>(depth * ldb + WIDTH<T>);
  std::vector<T> c = numbers<T>(all_m * ldc);
  for (std::ptrdiff_t i = 0; i < all_m; ++i)
    for (std::ptrdiff_t j = all_n; j < ldc; ++j) c[i * ldc + j] = canary;
  const std::vector<T> before = c;
  product(m, n, depth, a.data(), rows, columns, b.data(), ldb, c.data(), ldc, add);
  for (std::ptrdiff_t i = 0; i < all_m; ++i) {
    for (std::ptrdiff_t j = 0; j < n && i < m; ++j) {
      long double expected = add ? before[i * ldc + j] : 0, size = std::fabs(expected);
      for (std::ptrdiff_t p = 0; p < depth; ++p) {
        const long double term = (long double)a[i * rows + p * columns] * b[p * ldb + j];
        expected += term, size += std::fabs(term);
      }
      CHECK(std::fabs(c[i * ldc + j] - expected) <= (depth + 1) * std::numeric_limits<T>::epsilon() * size,
            "[%td %td %td] at %td, %td: %g, not %Lg", m, n, depth, i, j, double(c[i * ldc + j]), expected);
    }
    for (std::ptrdiff_t j = all_n; j < ldc; ++j) CHECK(c[i * ldc + j] == canary, "column %td of %td", j, all_n);
  }
}

template <class T>
void products() {
  for (std::ptrdiff_t m : {1, 6, 12, 13, 48})
    for (std::ptrdiff_t n : {1, 4, 16, 17, 33, 48, 64, 80})
      for (std::ptrdiff_t depth : {0, 1, 5, 64})
        for (bool transposed : {false, true})
          for (bool add : {false, true}) check<T>(m, n, depth, transposed, add);
}

}  // namespace
}  // namespace gradmem

int main() { return gradmem::run({gradmem::products<float>, gradmem::products<double>}); }
