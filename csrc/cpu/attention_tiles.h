// What attention does with tiles: a block of rows of one head, against a block of keys. Formulas: docs/attention.md.
#pragma once

#include <cmath>
#include <type_traits>

#include "attention.h"
#include "parallel.h"
#include "product.h"

namespace gradmem {
namespace {

// Rows and keys of a tile; multiples of PRODUCT_ROWS and of every vector's width.
constexpr Index ROWS = 48;
constexpr Index KEYS = 48;
static_assert(ROWS % PRODUCT_ROWS == 0 && KEYS % PRODUCT_ROWS == 0 && KEYS % WIDTH<float> == 0, "tiles");

constexpr double INFINITE = __builtin_inf();

inline Index least(Index a, Index b) { return a < b ? a : b; }
inline Index most(Index a, Index b) { return a > b ? a : b; }
inline Index round_up(Index n, Index unit) { return (n + unit - 1) / unit * unit; }
inline bool meets(Index first, Index count, const Index range[2]) {
  return first < range[1] && range[0] < first + count;
}

// Keys first .. last - 1.
struct Interval {
  Index first, last;
};

// The keys that row i of sample b sees, mask and bias aside.
inline Interval seen_by(const Attention& c, Index b, Index i) {
  Index first = 0, last = c.keys, position = i + c.keys - c.rows;
  if (c.packed != nullptr) {
    first = most(first, c.packed[i]);
    last = least(last, c.packed[c.rows + i]);
    position = i + c.packed[2 * c.rows + i];
  }
  if (c.causal) last = least(last, position + 1);
  if (c.window > 0) {
    first = most(first, position - c.window + 1);
    if (!c.causal) last = least(last, position + c.window);
  }
  if (c.seqlens != nullptr) {
    last = least(last, c.seqlens[b]);
    if (c.rows == c.keys && i >= c.seqlens[b]) last = first;
  }
  return {first, most(first, last)};
}

// Some rows of one query head, and what they see: no key outside ``some``, every key of ``every``.
struct RowBlock {
  Index head, first, count;
  Interval some, every;
};

inline RowBlock row_block(const Attention& c, Index b, Index head, Index first) {
  RowBlock block{head, first, least(ROWS, c.rows - first), {c.keys, 0}, {0, c.keys}};
  for (Index i = first; i < first + block.count; ++i) {
    const Interval keys = seen_by(c, b, i);
    block.some = {least(block.some.first, keys.first), most(block.some.last, keys.last)};
    block.every = {most(block.every.first, keys.first), least(block.every.last, keys.last)};
  }
  return block;
}

// Rows first .. first + count - 1 of a head, times ``factor``: [capacity, width], zeros where there is nothing, and in
// rows outside ``range``.
template <class A>
inline void read_rows(const Attention& c, const View<3>& from, Index b, Index head, Index first, Index count,
                      Index capacity, Index width, A factor, const Index* range, A* to) {
  by_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* rows = static_cast<const T*>(from.data) + b * from.strides[0] + head * from.strides[1];
    for (Index i = 0; i < capacity; ++i) {
      const Index row = first + i;
      Index j = 0;
      if (i < count && (range == nullptr || (range[0] <= row && row < range[1]))) {
        const T* x = rows + row * from.strides[2];
        for (; j < c.d; ++j) to[i * width + j] = A(widened(x[j])) * factor;
      }
      for (; j < width; ++j) to[i * width + j] = 0;
    }
  });
}

// One row, times ``factor``.
template <class A>
inline void write_row(const Attention& c, const View<3>& to, Index b, Index head, Index row, A factor, const A* from) {
  by_dtype(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* y = static_cast<T*>(to.data) + b * to.strides[0] + head * to.strides[1] + row * to.strides[2];
    for (Index j = 0; j < c.d; ++j) narrow(Wide<T>(from[j] * factor), y + j);
  });
}

// [width, KEYS] of [KEYS, width].
template <class A>
inline void transpose(Index width, const A* from, A* to) {
  constexpr int W = WIDTH<A>;
  for (Index j = 0; j < width; j += W)
    for (Index i = 0; i < KEYS; i += W) {
      Vec<A> square[W];
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) square[n] = load(from + (i + n) * width + j);
      transpose_square<A>(square);
#pragma GCC unroll 16
      for (int n = 0; n < W; ++n) store(to + (j + n) * KEYS + i, square[n]);
    }
}

// The last steps of MurmurHash3: every bit of h changes half of the bits.
inline std::uint32_t mixed(std::uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// Multiplies the weights of a row, keys ``first`` on, by 0 where dropout drops them, else by 1 / (1 - dropout).
template <class A>
inline void drop(const Attention& c, Index b, Index head, Index row, Index first, A* weights) {
  const std::uint32_t state = mixed(mixed(mixed(c.seed) ^ std::uint32_t(b * c.heads + head)) ^ std::uint32_t(row));
  const A kept = A(1 / (1 - c.dropout));
  for (Index j = 0; j < KEYS; ++j) {
    const bool keep = mixed(state + std::uint32_t(first + j) * 0x9E3779B9u) >= c.threshold;
    weights[j] = keep ? weights[j] * kept : A(0);
  }
}

// u = tanh(s / cap) in the place of a tile's scores s, and cap * u in that of capped.
template <class A>
inline void cap(const Attention& c, Index count, A* s, A* capped) {
  const A most = A(c.softcap);
  for (Index i = 0; i < count * KEYS; i += WIDTH<A>) {
    const Vec<A> u = tanh<A>(load(s + i) / most);
    store(s + i, u);
    store(capped + i, u * most);
  }
}

// Adds the bias to a tile's scores, and less infinity where a key is hidden.
template <class A>
inline void hide(const Attention& c, Index b, const RowBlock& rows, Index first, Index count, A* s) {
  for (Index i = 0; i < rows.count; ++i, s += KEYS) {
    const Index row = rows.first + i;
    const Interval keys = seen_by(c, b, row);
    for (Index j = 0; j < KEYS; ++j)
      if (first + j < keys.first || first + j >= keys.last) s[j] = A(-INFINITE);
    if (c.mask) {
      const Index* by = c.mask.strides;
      const unsigned char* shown = static_cast<const unsigned char*>(c.mask.data) + b * by[0] + rows.head * by[1] +
                                   row * by[2] + first * by[3];
      for (Index j = 0; j < count; ++j)
        if (!shown[j * by[3]]) s[j] = A(-INFINITE);
    }
    if (c.bias)
      by_dtype(c.bias_dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Index* by = c.bias.strides;
        const T* bias = static_cast<const T*>(c.bias.data) + b * by[0] + rows.head * by[1] + row * by[2] +
                        first * by[3];
        for (Index j = 0; j < count; ++j) s[j] += A(widened(bias[j * by[3]]));
      });
  }
}

// Whether hide() would change anything.
inline bool hidden(const Attention& c, const RowBlock& rows, Index first) {
  return c.mask || c.bias || rows.every.first > first || rows.every.last < first + KEYS;
}

}  // namespace
}  // namespace gradmem
