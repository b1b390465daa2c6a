// The query side of attention's backward and dual backward on Hopper: dq and dq_t. Formulas: docs/attention.md.

#include "attention_backward_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

// Keys of a tile: what leaves room for two sums [rows, D] and four tiles of scores in a thread's registers.
template <int D>
constexpr int KEYS = D == 64 ? 64 : 32;

template <int D, class W>
struct Shared {
  static constexpr int ROWS_T = W::primal ? OWN * D : 8, KEYS_T = W::primal ? KEYS<D> * D : 8;
  alignas(1024) T q[OWN * D];
  alignas(1024) T b[OWN * D];
  alignas(1024) T q_t[ROWS_T];
  alignas(1024) T a[W::with_a ? OWN * D : 8];
  alignas(1024) T k[STAGES][KEYS<D> * D];
  alignas(1024) T v[STAGES][KEYS<D> * D];
  alignas(1024) T k_t[STAGES][KEYS_T];
  alignas(1024) T v_t[STAGES][KEYS_T];
  Barrier::ValueType rows_there, keys_there[STAGES];
};

template <int D>
struct Loads {
  Load<OWN, D> q, b, q_t, a;
  Load<KEYS<D>, D> k, v, k_t, v_t;
};

// A block of 128 rows of one head.
template <int D, class W>
__global__ void __launch_bounds__(THREADS, 1)
    backward_queries_kernel(const __grid_constant__ AttentionBackward c, const __grid_constant__ Loads<D> loads,
                            const float* sums) {
  constexpr int N = KEYS<D>;
  auto& shared = *reinterpret_cast<Shared<D, W>*>(shared_memory());
  const int heads = int(c.heads), rows = int(c.rows);
  const float scale = float(c.scale);
  const Seen see = seen(c, blockIdx.z);
  const QueryBlock own = query_block<N>(c, see);
  const int sample = own.sample, head = own.head, kv_head = own.kv_head, block = own.block;
  const int first = own.first, tiles = own.tiles;

  const auto load_keys = [&](int tile) {
    const int stage = tile % STAGES;
    auto* there = &shared.keys_there[stage];
    Barrier::arrive_and_expect_tx(there, (W::primal ? 4 : 2) * N * D * sizeof(T));
    const auto load = [&](const Load<N, D>& from, T* to) {
      load_tile<N, D>(from, int(c.batch), int(c.kv_heads), int(c.keys), sample, kv_head, tile, to, there);
    };
    load(loads.k, shared.k[stage]);
    load(loads.v, shared.v[stage]);
    if constexpr (W::primal) load(loads.k_t, shared.k_t[stage]);
    if constexpr (W::primal) load(loads.v_t, shared.v_t[stage]);
  };
  start_barriers(shared.rows_there, shared.keys_there);
  if (threadIdx.x == 0 && tiles > 0) {
    auto* there = &shared.rows_there;
    Barrier::arrive_and_expect_tx(there, (2 + W::primal + W::with_a) * OWN * D * sizeof(T));
    const auto load = [&](const Load<OWN, D>& from, T* to) {
      load_tile<OWN, D>(from, int(c.batch), heads, rows, sample, head, block, to, there);
    };
    load(loads.q, shared.q);
    load(loads.b, shared.b);
    if constexpr (W::primal) load(loads.q_t, shared.q_t);
    if constexpr (W::with_a) load(loads.a, shared.a);
    load_keys(0);
  }

  auto dq = sums_fragment<N, D>(), dq_t = sums_fragment<N, D>();
  auto p = scores_fragment<N, D>(), p_t = scores_fragment<N, D>();
  auto ds = scores_fragment<N, D>(), ds_t = scores_fragment<N, D>();
  const auto place = places<Scores<N, D>, N>();
  const auto by_row = [](auto& t) { return make_tensor(t.data(), as_rows(t.layout())); };
  auto p_rows = by_row(p), p_t_rows = by_row(p_t), ds_rows = by_row(ds), ds_t_rows = by_row(ds_t);
  RowSums row[2];
  int keys[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int n = first + int(get<0>(place(i, 0)));
    keys[i] = see.keys_of(n);
    if (n < rows) row[i] = row_sums<W>(c, sums, (Index(sample) * heads + head) * rows + n);
  }

  if (tiles > 0) Barrier::wait(&shared.rows_there, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % STAGES;
    if (threadIdx.x == 0 && tile + 1 < tiles) load_keys(tile + 1);
    Barrier::wait(&shared.keys_there[stage], tile / STAGES % 2);

    begin(p, p_t, ds, ds_t);
    multiply_scores<N, D>(shared.q, shared.k[stage], p, false);
    multiply_scores<N, D>(shared.b, shared.v[stage], ds, false);
    if constexpr (W::primal) {
      multiply_scores<N, D>(shared.q_t, shared.k[stage], p_t, false);
      multiply_scores<N, D>(shared.q, shared.k_t[stage], p_t, true);
      multiply_scores<N, D>(shared.b, shared.v_t[stage], ds_t, false);
    }
    if constexpr (W::with_a) multiply_scores<N, D>(shared.a, shared.v[stage], ds_t, true);
    wait(p, p_t, ds, ds_t);

    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < size<1>(p_rows); ++j) {
        const bool visible = tile * N + int(get<1>(place(i, j))) < keys[i];
        combine<W>(row[i], scale, visible, p_rows(i, j), p_t_rows(i, j), ds_rows(i, j), ds_t_rows(i, j));
      }
    }
    auto x = rounded(ds), x_t = rounded(ds_t);
    begin(dq, dq_t, x, x_t);
    if constexpr (W::primal) {
      multiply_sums<N, D>(x_t, shared.k[stage], dq);
      multiply_sums<N, D>(x, shared.k_t[stage], dq);
    }
    if constexpr (W::tangent) multiply_sums<N, D>(x, shared.k[stage], dq_t);
    wait(dq, dq_t);
    __syncthreads();  // the stage may be filled again
  }
  const float factor[2] = {scale, scale};
  if constexpr (W::primal) write_rows<D>(dq, factor, c.dq, sample, head, first, rows);
  if constexpr (W::tangent) write_rows<D>(dq_t, factor, c.dq_t, sample, head, first, rows);
}

template <int D, class W>
void launch(const AttentionBackward& c, const float* sums) {
  const auto of_rows = [&](const View<3>& t) { return make_load<OWN, D>(t ? t : c.q, c.batch, c.heads, c.rows); };
  const auto of_keys = [&](const View<3>& t) {
    return make_load<KEYS<D>, D>(t ? t : c.k, c.batch, c.kv_heads, c.keys);
  };
  const Loads<D> loads{of_rows(c.q), of_rows(c.b), of_rows(c.q_t), of_rows(c.a),
                       of_keys(c.k), of_keys(c.v), of_keys(c.k_t), of_keys(c.v_t)};
  launch_blocks("attention_backward: queries", backward_queries_kernel<D, W>, c.rows, c.heads, c.batch,
                sizeof(Shared<D, W>), c, loads, sums);
}

template <int D>
void launch_wanted(const AttentionBackward& c, const float* sums) {
  if (!c.dq)
    launch<D, Plain>(c, sums);
  else
    c.dq_t ? launch<D, Both>(c, sums) : launch<D, Double>(c, sums);
}

}  // namespace

void attention_backward_queries(const AttentionBackward& c, const float* sums) {
  c.d == 64 ? launch_wanted<64>(c, sums) : launch_wanted<128>(c, sums);
}

}  // namespace cuda
}  // namespace gradmem
