// Attention's forward and dual forward on a CPU: o, lse, and with tangents o_t, mu. Formulas: docs/attention.md.
//
// A task takes blocks of rows of the query heads that share a key head, and goes over the keys once: every block of
// keys is laid out for products once, then met by each block of rows. Rows do not know of each other, and meet their
// keys in order, so that results do not depend on how the work is divided.

#include "attention_tiles.h"
#include "kernels.h"

namespace gradmem {
namespace {

// Blocks of rows that a task holds at once: what stays in the second level's cache with a block of keys.
constexpr Index BLOCKS = 6;

template <class A>
class ForwardTask {
 public:
  ForwardTask(const AttentionForward& call, Scratch& scratch) : c(call), width(round_up(c.d, WIDTH<A>)) {
    const Index rows = BLOCKS * ROWS;
    scratch.reserve((4 * rows * width + 3 * rows + 6 * KEYS * width + 3 * ROWS * KEYS) * sizeof(A),
                    20);
    for (A** array : {&q, &q_t, &o, &o_t}) *array = scratch.take<A>(rows * width);
    for (A** array : {&row_max, &row_sum, &mu}) *array = scratch.take<A>(rows);
    for (A** array : {&k, &k_t, &v, &v_t}) *array = scratch.take<A>(KEYS * width);
    for (A** array : {&k_columns, &k_t_columns}) *array = scratch.take<A>(KEYS * width);
    for (A** array : {&s, &s_t, &capped}) *array = scratch.take<A>(ROWS * KEYS);
  }

  // Blocks first .. first + count - 1 of the rows of this key head, counted over its query heads.
  void run(Index sample, Index kv_head, Index first, Index count) {
    b = sample;
    const Index per_head = (c.rows + ROWS - 1) / ROWS, group = c.heads / c.kv_heads;
    Interval keys{c.keys, 0};
    for (Index n = 0; n < count; ++n) {
      blocks[n] = row_block(c, b, kv_head * group + (first + n) / per_head, (first + n) % per_head * ROWS);
      keys = {least(keys.first, blocks[n].some.first), most(keys.last, blocks[n].some.last)};
      start(n);
    }
    for (Index j = keys.first / KEYS * KEYS; j < keys.last; j += KEYS) {
      bool met = false;
      for (Index n = 0; n < count; ++n)
        if (blocks[n].some.first < j + KEYS && j < blocks[n].some.last) {
          if (!met) read_keys(kv_head, j);
          met = true;
          meet(n, j);
        }
    }
    for (Index n = 0; n < count; ++n) finish(n);
  }

 private:
  void start(Index n) {
    const RowBlock& block = blocks[n];
    const A scale = A(c.scale);
    read_rows(c, c.q, b, block.head, block.first, block.count, ROWS, width, scale, nullptr, q + n * ROWS * width);
    if (c.q_t)
      read_rows(c, c.q_t, b, block.head, block.first, block.count, ROWS, width, scale, c.tangent_rows,
                q_t + n * ROWS * width);
    for (Index i = n * ROWS * width; i < (n + 1) * ROWS * width; ++i) o[i] = o_t[i] = 0;
    for (Index i = 0; i < ROWS; ++i) {
      const Index row = n * ROWS + i;
      // known weights are exp(s - lse), and their sum is 1
      row_max[row] = c.known && i < block.count ? static_cast<A*>(c.lse)[place(block, i)] : A(-INFINITE);
      row_sum[row] = c.known;
      mu[row] = 0;
    }
  }

  void read_keys(Index head, Index first) {
    key_count = least(KEYS, c.keys - first);
    tangents = meets(first, key_count, c.tangent_rows);
    const auto read = [&](const View<3>& from, const Index* range, A* to) {
      read_rows(c, from, b, head, first, key_count, KEYS, width, A(1), range, to);
    };
    read(c.k, nullptr, k);
    transpose(width, k, k_columns);
    read(c.v, nullptr, v);
    if (c.k_t && tangents) {
      read(c.k_t, c.tangent_rows, k_t);
      transpose(width, k_t, k_t_columns);
    }
    if (c.v_t && tangents) read(c.v_t, c.tangent_rows, v_t);
  }

  // A tile: block n of the rows against the keys that were read.
  void meet(Index n, Index first) {
    const RowBlock& block = blocks[n];
    const Index rows = round_up(block.count, PRODUCT_ROWS), columns = round_up(key_count, WIDTH<A>);
    const A* block_q = q + n * ROWS * width;
    const A* block_q_t = q_t + n * ROWS * width;
    A* block_o = o + n * ROWS * width;
    A* block_o_t = o_t + n * ROWS * width;
    const bool from_q = c.q_t && meets(block.first, block.count, c.tangent_rows), from_k = c.k_t && tangents;

    product(rows, columns, c.d, block_q, width, 1, k_columns, KEYS, s, KEYS, false);
    if (from_q) product(rows, columns, c.d, block_q_t, width, 1, k_columns, KEYS, s_t, KEYS, false);
    if (from_k) product(rows, columns, c.d, block_q, width, 1, k_t_columns, KEYS, s_t, KEYS, from_q);
    A* scores = s;
    if (c.softcap > 0) {
      cap(c, rows, s, capped);
      scores = capped;
      if (from_q || from_k)
        for (Index i = 0; i < rows * KEYS; ++i) s_t[i] *= 1 - s[i] * s[i];
    }
    if (hidden(c, block, first)) hide(c, b, block, first, key_count, scores);
    for (Index i = 0; i < block.count; ++i) {
      const Index row = n * ROWS + i;
      weigh(row, columns, scores + i * KEYS, from_q || from_k ? s_t + i * KEYS : nullptr, block_o + i * width,
            block_o_t + i * width);
      if (c.dropout > 0) {
        drop(c, b, block.head, block.first + i, first, scores + i * KEYS);
        if (from_q || from_k) drop(c, b, block.head, block.first + i, first, s_t + i * KEYS);
      }
    }
    if (!c.known) product(rows, width, key_count, scores, KEYS, 1, v, width, block_o, width, true);
    if (from_q || from_k) product(rows, width, key_count, s_t, KEYS, 1, v, width, block_o_t, width, true);
    if (c.v_t && tangents) product(rows, width, key_count, scores, KEYS, 1, v_t, width, block_o_t, width, true);
  }

  // Of one row: p = exp(s - max) in the place of s, p * s_t in that of s_t; their sums, and all earlier sums, for the
  // maximum so far.
  void weigh(Index row, Index columns, A* s, A* s_t, A* o, A* o_t) {
    if (!c.known) raise_maximum(row, columns, s, o, o_t);
    const A base = row_max[row] == A(-INFINITE) ? A(0) : row_max[row];
    Vec<A> p_sum{}, mu_sum{};
    for (Index j = 0; j < columns; j += WIDTH<A>) {
      const Vec<A> p = exp<A>(load(s + j) - base);
      store(s + j, p);
      p_sum += p;
      if (s_t != nullptr) {
        const Vec<A> p_s_t = p * load(s_t + j);
        store(s_t + j, p_s_t);
        mu_sum += p_s_t;
      }
    }
    if (!c.known) row_sum[row] += sum<A>(p_sum);
    mu[row] += sum<A>(mu_sum);
  }

  void raise_maximum(Index row, Index columns, const A* s, A* o, A* o_t) {
    Vec<A> top = load(s);
    for (Index j = WIDTH<A>; j < columns; j += WIDTH<A>) {
      const Vec<A> x = load(s + j);
      top = x > top ? x : top;
    }
    const A before = row_max[row], now = largest<A>(top);
    if (!(now > before)) return;
    const A factor = exp<A>(all(before - now))[0];
    row_max[row] = now;
    row_sum[row] *= factor;
    mu[row] *= factor;
    for (Index j = 0; j < width; j += WIDTH<A>) {
      store(o + j, load(o + j) * factor);
      store(o_t + j, load(o_t + j) * factor);
    }
  }

  void finish(Index n) {
    const RowBlock& block = blocks[n];
    for (Index i = 0; i < block.count; ++i) {
      const Index row = n * ROWS + i, at = place(block, i);
      const bool empty = row_sum[row] == 0;
      const A inverse = empty ? A(0) : 1 / row_sum[row], mean = mu[row] * inverse;
      A* row_o = o + row * width;
      A* row_o_t = o_t + row * width;
      if (c.known) {
        read_rows(c, c.o, b, block.head, block.first + i, 1, 1, width, A(1), nullptr, row_o);
      } else {
        static_cast<A*>(c.lse)[at] = empty ? A(INFINITE) : row_max[row] + std::log(row_sum[row]);
        write_row(c, c.o, b, block.head, block.first + i, inverse, row_o);
      }
      if (c.o_t) {
        static_cast<A*>(c.mu)[at] = mean;
        for (Index j = 0; j < c.d; ++j) row_o_t[j] -= mean * row_o[j];
        write_row(c, c.o_t, b, block.head, block.first + i, inverse, row_o_t);
      }
    }
  }

  // Where lse and mu have row i of a block.
  Index place(const RowBlock& block, Index i) const {
    return (b * c.heads + block.head) * c.rows + block.first + i;
  }

  const AttentionForward& c;
  const Index width;
  Index b = 0, key_count = 0;
  bool tangents = false;  // whether the keys that were read may have some
  RowBlock blocks[BLOCKS];
  A *q, *q_t, *o, *o_t;             // [BLOCKS * ROWS, width]; q and q_t times the scale
  A *row_max, *row_sum, *mu;        // [BLOCKS * ROWS]
  A *k, *k_t, *v, *v_t;             // [KEYS, width]
  A *k_columns, *k_t_columns;       // [width, KEYS]
  A *s, *s_t, *capped;              // [ROWS, KEYS]
};

template <class A>
void run(const AttentionForward& c) {
  const Index blocks = (c.rows + ROWS - 1) / ROWS * (c.heads / c.kv_heads), heads = c.batch * c.kv_heads;
  // fewer blocks for a task where there are too few tasks to share
  const Index size = most(1, least(BLOCKS, blocks * heads / (4 * c.threads)));
  const Index parts = (blocks + size - 1) / size;
  parallel_for(heads * parts, c.threads, [&](Index i) {
    static thread_local Scratch scratch;
    // last blocks first: causal rows see more the later they are
    const Index head = i % heads, first = (parts - 1 - i / heads) * size;
    ForwardTask<A>(c, scratch).run(head / c.kv_heads, head % c.kv_heads, first, least(size, blocks - first));
  });
}

}  // namespace

namespace GRADMEM_ISA {
void attention_forward(const AttentionForward& c) { c.dtype == Dtype::float64 ? run<double>(c) : run<float>(c); }
}  // namespace GRADMEM_ISA

}  // namespace gradmem
