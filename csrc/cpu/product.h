// Products of small matrices in a thread's own memory: what tiles of attention are made of.
#pragma once

#include <type_traits>

#include "simd.h"

namespace gradmem {
namespace {

// C [PRODUCT_ROWS, N vectors] = (C +) A B over ``depth``. Element (m, p) of A is a[m * rows + p * columns].
template <int N, class T>
inline void product_in_registers(std::ptrdiff_t depth, const T* a, std::ptrdiff_t rows, std::ptrdiff_t columns,
                                 const T* b, std::ptrdiff_t ldb, T* c, std::ptrdiff_t ldc, bool add) {
  constexpr int M = PRODUCT_ROWS;
  Vec<T> sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[m][n] = add ? load(c + m * ldc + n * WIDTH<T>) : Vec<T>{};
  for (std::ptrdiff_t p = 0; p < depth; ++p) {
    Vec<T> row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + p * ldb + n * WIDTH<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] += row[n] * a[m * rows + p * columns];
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * ldc + n * WIDTH<T>, sums[m][n]);
}

// C [m, n] = (C +) A B over ``depth``; m is rounded up to PRODUCT_ROWS and n to vectors, which must be there.
// Every element of C is one sum in the order of ``depth``, whatever m and n are.
template <class T>
inline void product(std::ptrdiff_t m, std::ptrdiff_t n, std::ptrdiff_t depth, const T* a, std::ptrdiff_t rows,
                    std::ptrdiff_t columns, const T* b, std::ptrdiff_t ldb, T* c, std::ptrdiff_t ldc, bool add) {
  std::ptrdiff_t j = 0, left = (n + WIDTH<T> - 1) / WIDTH<T>;  // vectors of columns
  const auto take = [&](auto vectors) {
    for (std::ptrdiff_t i = 0; i < m; i += PRODUCT_ROWS)
      product_in_registers<vectors()>(depth, a + i * rows, rows, columns, b + j, ldb, c + i * ldc + j, ldc, add);
    j += vectors() * WIDTH<T>;
    left -= vectors();
  };
  while (left > 0) {
    if (left == 1)
      take(std::integral_constant<int, 1>{});
    else if (PRODUCT_VECTORS == 2 || left == 2 || left == 4)
      take(std::integral_constant<int, 2>{});
    else
      take(std::integral_constant<int, PRODUCT_VECTORS>{});
  }
}

}  // namespace
}  // namespace gradmem
