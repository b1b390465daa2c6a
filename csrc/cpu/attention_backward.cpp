// Attention's backward and dual backward on a CPU. Formulas and names: docs/attention.md. A plain backward is that of
// the tangents, with the output's cotangent in the place of b.
//
// A task takes some blocks of rows, or some blocks of keys, of the query heads that share a key head, or all of both.
// Tiles are met in the order of rows for every key, and of keys for every row, so that results do not depend on how
// the work is divided.

#include "attention_tiles.h"
#include "kernels.h"

namespace gradmem {
namespace {

// Blocks of rows that a task holds at once: what stays in the second level's cache with a block of keys.
constexpr Index BLOCKS = 4;
// Bytes of the sums for keys that a task may hold; beyond, rows and keys are different tasks.
constexpr Index MOST_BYTES = 16 << 20;

// Some blocks of a key head's rows (counted over its query heads) and of its keys, and whose cotangents are wanted.
struct Part {
  Index first_rows, rows, first_keys, keys;
  bool of_rows, of_keys;
};

template <class A>
class BackwardTask {
 public:
  BackwardTask(const AttentionBackward& call, Scratch& scratch, const Part& task)
      : c(call), part(task), width(round_up(c.d, WIDTH<A>)), primal(c.dq || c.dk || c.dv) {
    const Index rows = BLOCKS * ROWS, sums = part.of_keys ? part.keys * KEYS : 0;
    scratch.reserve(((6 * width + 4) * rows + 8 * KEYS * width + 6 * ROWS * KEYS + 4 * sums * width) *
                        sizeof(A), 32);
    for (A** array : {&q, &q_t, &a, &b, &dq, &dq_t}) *array = scratch.take<A>(rows * width);
    for (A** array : {&lse, &mu, &o_b, &o_b_t}) *array = scratch.take<A>(rows);
    for (A** array : {&k, &k_t, &v, &v_t}) *array = scratch.take<A>(KEYS * width);
    for (A** array : {&k_columns, &k_t_columns, &v_columns, &v_t_columns}) *array = scratch.take<A>(KEYS * width);
    for (A** array : {&p, &p_t, &ds, &ds_t, &u, &s_t}) *array = scratch.take<A>(ROWS * KEYS);
    for (A** array : {&dk, &dv, &dk_t, &dv_t}) *array = scratch.take<A>(sums * width);
    for (A* array : {dk, dv, dk_t, dv_t})
      for (Index i = 0; i < sums * width; ++i) array[i] = 0;
  }

  void run(Index of_sample, Index of_head) {
    sample = of_sample;
    kv_head = of_head;
    for (Index first = 0; first < part.rows; first += BLOCKS) run_rows(part.first_rows + first,
                                                                       least(BLOCKS, part.rows - first));
    if (part.of_keys) write_keys();
  }

 private:
  // The cotangents that are wanted of a tile.
  struct Wanted {
    bool dq, dk, dv, dq_t, dk_t, dv_t;
    bool primal() const { return dq || dk || dv; }
    bool scores() const { return dq || dk || dq_t || dk_t; }
    bool any() const { return primal() || dq_t || dk_t || dv_t; }
  };

  void run_rows(Index first, Index count) {
    const Index per_head = (c.rows + ROWS - 1) / ROWS, group = c.heads / c.kv_heads;
    for (Index n = 0; n < count; ++n) {
      blocks[n] = row_block(c, sample, kv_head * group + (first + n) / per_head, (first + n) % per_head * ROWS);
      start(n);
    }
    for (Index j = part.first_keys * KEYS; j < least(c.keys, (part.first_keys + part.keys) * KEYS); j += KEYS) {
      bool met = false;
      for (Index n = 0; n < count; ++n) {
        const Wanted wanted = wanted_of(blocks[n], j);
        if (blocks[n].some.first < j + KEYS && j < blocks[n].some.last && wanted.any()) {
          if (!met) read_keys(j);
          met = true;
          meet(n, j, wanted);
        }
      }
    }
    if (part.of_rows)
      for (Index n = 0; n < count; ++n) write_rows(n);
  }

  Wanted wanted_of(const RowBlock& block, Index first) const {
    const Index count = least(KEYS, c.keys - first);
    const bool rows = part.of_rows && meets(block.first, block.count, c.grad_rows);
    const bool rows_t = part.of_rows && meets(block.first, block.count, c.tangent_rows);
    const bool keys = part.of_keys && meets(first, count, c.grad_rows);
    const bool keys_t = part.of_keys && meets(first, count, c.tangent_rows);
    return {rows && c.dq, keys && c.dk, keys && c.dv, rows_t && c.dq_t, keys_t && c.dk_t, keys_t && c.dv_t};
  }

  void start(Index n) {
    const RowBlock& block = blocks[n];
    const A scale = A(c.scale);
    const auto read = [&](const View<3>& from, A factor, const Index* range, A* to) {
      read_rows(c, from, sample, block.head, block.first, block.count, ROWS, width, factor, range, to);
    };
    const Index at = n * ROWS * width;
    read(c.q, scale, nullptr, q + at);
    read(c.b, A(1), nullptr, b + at);
    if (primal && c.q_t) read(c.q_t, scale, c.tangent_rows, q_t + at);
    if (primal && c.a) read(c.a, A(1), nullptr, a + at);
    // o and o_t are read once, for the sums over a row: in the place of its cotangents
    read(c.o, A(1), nullptr, dq + at);
    if (primal && c.o_t) read(c.o_t, A(1), nullptr, dq_t + at);
    for (Index i = 0; i < ROWS; ++i) {
      const Index row = n * ROWS + i, from = (sample * c.heads + block.head) * c.rows + block.first + i;
      const bool inside = i < block.count;
      lse[row] = inside ? static_cast<const A*>(c.lse)[from] : A(INFINITE);
      mu[row] = inside && primal && c.mu != nullptr ? static_cast<const A*>(c.mu)[from] : A(0);
      const A *o = dq + row * width, *o_t = dq_t + row * width;
      // D = sum(b * o),  D_t = sum(a * o + b * o_t)
      o_b[row] = dot(b + row * width, o);
      o_b_t[row] = (primal && c.a ? dot(a + row * width, o) : 0) +
                   (primal && c.o_t ? dot(b + row * width, o_t) : 0);
    }
    for (Index i = at; i < at + ROWS * width; ++i) dq[i] = dq_t[i] = 0;
  }

  A dot(const A* x, const A* y) const {
    Vec<A> total{};
    for (Index j = 0; j < width; j += WIDTH<A>) total += load(x + j) * load(y + j);
    return sum<A>(total);
  }

  void read_keys(Index first) {
    key_count = least(KEYS, c.keys - first);
    tangents = primal && meets(first, key_count, c.tangent_rows);
    const auto read = [&](const View<3>& from, const Index* range, A* to, A* columns) {
      read_rows(c, from, sample, kv_head, first, key_count, KEYS, width, A(1), range, to);
      transpose(width, to, columns);
    };
    read(c.k, nullptr, k, k_columns);
    read(c.v, nullptr, v, v_columns);
    if (c.k_t && tangents) read(c.k_t, c.tangent_rows, k_t, k_t_columns);
    if (c.v_t && tangents) read(c.v_t, c.tangent_rows, v_t, v_t_columns);
  }

  // A tile: block n of the rows against the keys that were read.
  void meet(Index n, Index first, const Wanted& wanted) {
    const RowBlock& block = blocks[n];
    const Index rows = round_up(block.count, PRODUCT_ROWS), columns = round_up(key_count, WIDTH<A>);
    const Index at = n * ROWS * width, at_keys = (first - part.first_keys * KEYS) * width;
    const bool dual = wanted.primal();
    const bool from_q = dual && c.q_t && meets(block.first, block.count, c.tangent_rows);
    const bool from_k = dual && c.k_t && tangents, from_v = dual && c.v_t && tangents;
    const bool dp_t = (wanted.dq || wanted.dk) && (c.a || from_v);
    const bool moves = dual && (c.q_t || c.k_t);  // P_t = P * (S_t - mu), even where S_t is zero

    product(rows, columns, c.d, q + at, width, 1, k_columns, KEYS, p, KEYS, false);
    if (from_q) product(rows, columns, c.d, q_t + at, width, 1, k_columns, KEYS, p_t, KEYS, false);
    if (from_k) product(rows, columns, c.d, q + at, width, 1, k_t_columns, KEYS, p_t, KEYS, from_q);
    if (moves && !from_q && !from_k)
      for (Index i = 0; i < rows * KEYS; ++i) p_t[i] = 0;
    if (wanted.scores()) product(rows, columns, c.d, b + at, width, 1, v_columns, KEYS, ds, KEYS, false);
    if (dp_t && c.a) product(rows, columns, c.d, a + at, width, 1, v_columns, KEYS, ds_t, KEYS, false);
    if (dp_t && from_v) product(rows, columns, c.d, b + at, width, 1, v_t_columns, KEYS, ds_t, KEYS, bool(c.a));

    if (c.softcap > 0) {
      for (Index i = 0; i < rows * KEYS; ++i) u[i] = p[i];
      cap(c, rows, u, p);
      if (moves)
        for (Index i = 0; i < rows * KEYS; ++i) s_t[i] = p_t[i] *= 1 - u[i] * u[i];
    }
    if (hidden(c, block, first)) hide(c, sample, block, first, key_count, p);
    for (Index i = 0; i < block.count; ++i) {
      const Index row = n * ROWS + i, tile = i * KEYS;
      const auto dropped = [&](A* weights) {
        if (c.dropout > 0) drop(c, sample, block.head, block.first + i, first, weights + tile);
      };
      if (wanted.scores()) dropped(ds);
      if (dp_t) dropped(ds_t);
      combine(row, columns, moves, dp_t, wanted, p + tile, p_t + tile, ds + tile, ds_t + tile);
      dropped(p);
      if (moves) dropped(p_t);
    }
    if (c.softcap > 0 && wanted.scores()) uncap(rows, moves, wanted.dq || wanted.dk);
    const Index depth = block.count, keys = key_count, key_rows = round_up(keys, PRODUCT_ROWS);
    const auto to_rows = [&](const A* weights, const A* of_keys, A* to) {
      product(rows, width, keys, weights, KEYS, 1, of_keys, width, to + at, width, true);
    };
    const auto to_keys = [&](const A* weights, const A* of_rows, A* to) {
      product(key_rows, width, depth, weights, 1, KEYS, of_rows + at, width, to + at_keys, width, true);
    };
    if (wanted.dq) {
      to_rows(ds_t, k, dq);
      if (from_k) to_rows(ds, k_t, dq);
    }
    if (wanted.dq_t) to_rows(ds, k, dq_t);
    if (wanted.dk) {
      to_keys(ds_t, q, dk);
      if (from_q) to_keys(ds, q_t, dk);
    }
    if (wanted.dk_t) to_keys(ds, q, dk_t);
    if (wanted.dv) {
      if (moves) to_keys(p_t, b, dv);
      if (c.a) to_keys(p, a, dv);
    }
    if (wanted.dv_t) to_keys(p, b, dv_t);
  }

  // Of one row, from the scores in the place of p, S_t in that of p_t, dP and dP_t: P, P_t = P * (S_t - mu),
  // dS = P * (dP - D) and dS_t = P_t * (dP - D) + P * (dP_t - D_t).
  void combine(Index row, Index columns, bool moves, bool dp_t, const Wanted& wanted, A* row_p, A* row_p_t, A* row_ds,
               A* row_ds_t) const {
    const bool scores = wanted.scores(), scores_t = wanted.dq || wanted.dk;
    for (Index j = 0; j < columns; j += WIDTH<A>) {
      const Vec<A> x_p = exp<A>(load(row_p + j) - lse[row]);
      Vec<A> x_p_t{}, x{};
      store(row_p + j, x_p);
      if (moves) {
        x_p_t = x_p * (load(row_p_t + j) - mu[row]);
        store(row_p_t + j, x_p_t);
      }
      if (scores) {
        x = load(row_ds + j) - o_b[row];
        store(row_ds + j, x_p * x);
      }
      if (scores_t) {
        const Vec<A> change = dp_t ? load(row_ds_t + j) - o_b_t[row] : all(-o_b_t[row]);
        store(row_ds_t + j, moves ? x_p_t * x + x_p * change : x_p * change);
      }
    }
  }

  // From the cotangents of the capped scores those of scale * q k^T and of its tangent.
  void uncap(Index rows, bool moves, bool scores_t) const {
    const A factor = A(-2 / c.softcap);
    for (Index i = 0; i < rows * KEYS; i += WIDTH<A>) {
      const Vec<A> x = load(u + i), slope = A(1) - x * x, before = load(ds + i);
      store(ds + i, before * slope);
      if (scores_t) {
        const Vec<A> change = load(ds_t + i) * slope;
        store(ds_t + i, moves ? change + x * load(s_t + i) * before * factor : change);
      }
    }
  }

  void write_rows(Index n) const {
    const RowBlock& block = blocks[n];
    const auto write = [&](const View<3>& to, const A* from, const Index range[2]) {
      if (!to) return;
      for (Index row = most(block.first, range[0]); row < least(block.first + block.count, range[1]); ++row)
        write_row(c, to, sample, block.head, row, A(c.scale), from + (n * ROWS + row - block.first) * width);
    };
    write(c.dq, dq, c.grad_rows);
    write(c.dq_t, dq_t, c.tangent_rows);
  }

  void write_keys() const {
    const Index first = part.first_keys * KEYS, last = least(c.keys, first + part.keys * KEYS);
    const auto write = [&](const View<3>& to, const A* from, const Index range[2]) {
      if (!to) return;
      for (Index row = most(first, range[0]); row < least(last, range[1]); ++row)
        write_row(c, to, sample, kv_head, row, A(1), from + (row - first) * width);
    };
    write(c.dk, dk, c.grad_rows);
    write(c.dv, dv, c.grad_rows);
    write(c.dk_t, dk_t, c.tangent_rows);
    write(c.dv_t, dv_t, c.tangent_rows);
  }

  const AttentionBackward& c;
  const Part part;
  const Index width;
  const bool primal;  // whether cotangents of q, k and v are wanted
  Index sample = 0, kv_head = 0, key_count = 0;
  bool tangents = false;  // whether the keys that were read may have some
  RowBlock blocks[BLOCKS];
  A *q, *q_t, *a, *b, *dq, *dq_t;                               // [BLOCKS * ROWS, width]; q and q_t times the scale
  A *lse, *mu, *o_b, *o_b_t;                                    // [BLOCKS * ROWS]
  A *k, *k_t, *v, *v_t;                                         // [KEYS, width]
  A *k_columns, *k_t_columns, *v_columns, *v_t_columns;         // [width, KEYS]
  A *p, *p_t, *ds, *ds_t, *u, *s_t;                             // [ROWS, KEYS]
  A *dk, *dv, *dk_t, *dv_t;                                     // [part.keys * KEYS, width]
};

template <class A>
void run(const AttentionBackward& c) {
  const Index rows = (c.rows + ROWS - 1) / ROWS * (c.heads / c.kv_heads), keys = (c.keys + KEYS - 1) / KEYS;
  const Index heads = c.batch * c.kv_heads, bytes = 4 * KEYS * round_up(c.d, WIDTH<A>) * Index(sizeof(A));
  const bool of_rows = c.dq || c.dq_t, of_keys = c.dk || c.dv || c.dk_t || c.dv_t;
  const auto run_task = [&](Index head, const Part& part) {
    static thread_local Scratch scratch;
    BackwardTask<A>(c, scratch, part).run(head / c.kv_heads, head % c.kv_heads);
  };
  if (of_rows && of_keys && heads >= c.threads && keys * bytes <= MOST_BYTES) {
    // in one: 15 products of a tile in the place of 21
    parallel_for(heads, c.threads, [&](Index i) { run_task(i, {0, rows, 0, keys, true, true}); });
    return;
  }
  if (of_rows) {
    const Index size = most(1, least(BLOCKS, rows * heads / (4 * c.threads))), parts = (rows + size - 1) / size;
    parallel_for(heads * parts, c.threads, [&](Index i) {
      // last blocks first: causal rows see more the later they are
      const Index first = (parts - 1 - i / heads) * size;
      run_task(i % heads, {first, least(size, rows - first), 0, keys, true, false});
    });
  }
  if (of_keys) {
    const Index size = most(1, least(MOST_BYTES / bytes, keys * heads / (4 * c.threads)));
    const Index parts = (keys + size - 1) / size;
    parallel_for(heads * parts, c.threads, [&](Index i) {
      const Index first = i / heads * size;
      run_task(i % heads, {0, rows, first, least(size, keys - first), false, true});
    });
  }
}

}  // namespace

namespace GRADMEM_ISA {
void attention_backward(const AttentionBackward& c) { c.dtype == Dtype::float64 ? run<double>(c) : run<float>(c); }
}  // namespace GRADMEM_ISA

}  // namespace gradmem
