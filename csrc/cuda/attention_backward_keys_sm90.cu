// The key side of attention's backward and dual backward on Hopper: dk, dv, dk_t and dv_t. Formulas: docs/attention.md.
// Scores lie here with keys as rows and queries as columns.

#include "attention_backward_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

// Queries of a tile: what leaves room for up to four sums [keys, D] and four tiles of scores in a thread's registers.
constexpr int QUERIES = 32;

template <int D, class W>
struct Shared {
  static constexpr int KEYS_T = W::primal ? OWN * D : 8, ROWS_T = W::primal ? QUERIES * D : 8;
  alignas(1024) T k[OWN * D];
  alignas(1024) T v[OWN * D];
  alignas(1024) T k_t[KEYS_T];
  alignas(1024) T v_t[KEYS_T];
  alignas(1024) T q[STAGES][QUERIES * D];
  alignas(1024) T b[STAGES][QUERIES * D];
  alignas(1024) T q_t[STAGES][ROWS_T];
  alignas(1024) T a[STAGES][W::with_a ? QUERIES * D : 8];
  RowSums row[STAGES][QUERIES];
  int keys[STAGES][QUERIES];  // that a row sees
  Barrier::ValueType keys_there, rows_there[STAGES];
};

template <int D>
struct Loads {
  Load<OWN, D> k, v, k_t, v_t;
  Load<QUERIES, D> q, b, q_t, a;
};

// A block of 128 keys of one key head, over the rows of all query heads of its group.
template <int D, class W>
__global__ void __launch_bounds__(THREADS, 1)
    backward_keys_kernel(const __grid_constant__ AttentionBackward c, const __grid_constant__ Loads<D> loads,
                         const float* sums) {
  constexpr int N = QUERIES;
  auto& shared = *reinterpret_cast<Shared<D, W>*>(shared_memory());
  const int heads = int(c.heads), kv_heads = int(c.kv_heads), rows = int(c.rows), group = heads / kv_heads;
  const float scale = float(c.scale);
  const int sample = blockIdx.z, kv_head = blockIdx.y, block = blockIdx.x, first = block * OWN;
  const Seen see = seen(c, sample);
  // tiles of a head that may see a key of the block
  const int first_tile = see.first_row(first) / N;
  const int per_head = first >= see.keys ? 0 : max(0, (see.rows + N - 1) / N - first_tile), tiles = per_head * group;

  const auto load_rows = [&](int tile) {
    const int stage = tile % STAGES, head = kv_head * group + tile / per_head, i = first_tile + tile % per_head;
    auto* there = &shared.rows_there[stage];
    Barrier::arrive_and_expect_tx(there, (2 + W::primal + W::with_a) * N * D * sizeof(T));
    const auto load = [&](const Load<N, D>& from, T* to) {
      load_tile<N, D>(from, int(c.batch), heads, rows, sample, head, i, to, there);
    };
    load(loads.q, shared.q[stage]);
    load(loads.b, shared.b[stage]);
    if constexpr (W::primal) load(loads.q_t, shared.q_t[stage]);
    if constexpr (W::with_a) load(loads.a, shared.a[stage]);
  };
  // sums over a row, for the tile after the next barrier of the block
  const auto read_row_sums = [&](int tile) {
    const int stage = tile % STAGES, head = kv_head * group + tile / per_head;
    const int n = (first_tile + tile % per_head) * N + int(threadIdx.x);
    if (threadIdx.x >= N) return;
    shared.keys[stage][threadIdx.x] = see.keys_of(n);
    shared.row[stage][threadIdx.x] =
        n < rows ? row_sums<W>(c, sums, (Index(sample) * heads + head) * rows + n) : RowSums{};
  };
  if (tiles > 0) read_row_sums(0);
  start_barriers(shared.keys_there, shared.rows_there);
  if (threadIdx.x == 0 && tiles > 0) {
    auto* there = &shared.keys_there;
    Barrier::arrive_and_expect_tx(there, (W::primal ? 4 : 2) * OWN * D * sizeof(T));
    const auto load = [&](const Load<OWN, D>& from, T* to) {
      load_tile<OWN, D>(from, int(c.batch), kv_heads, int(c.keys), sample, kv_head, block, to, there);
    };
    load(loads.k, shared.k);
    load(loads.v, shared.v);
    if constexpr (W::primal) load(loads.k_t, shared.k_t);
    if constexpr (W::primal) load(loads.v_t, shared.v_t);
    load_rows(0);
  }

  auto dk = sums_fragment<N, D>(), dv = sums_fragment<N, D>();
  auto dk_t = sums_fragment<N, D>(), dv_t = sums_fragment<N, D>();
  auto p = scores_fragment<N, D>(), p_t = scores_fragment<N, D>();
  auto ds = scores_fragment<N, D>(), ds_t = scores_fragment<N, D>();
  const auto place = places<Scores<N, D>, N>();
  const auto by_row = [](auto& t) { return make_tensor(t.data(), as_rows(t.layout())); };
  auto p_rows = by_row(p), p_t_rows = by_row(p_t), ds_rows = by_row(ds), ds_t_rows = by_row(ds_t);

  if (tiles > 0) Barrier::wait(&shared.keys_there, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % STAGES;
    if (tile + 1 < tiles) {
      if (threadIdx.x == 0) load_rows(tile + 1);
      read_row_sums(tile + 1);
    }
    Barrier::wait(&shared.rows_there[stage], tile / STAGES % 2);

    begin(p, p_t, ds, ds_t);
    multiply_scores<N, D>(shared.k, shared.q[stage], p, false);
    multiply_scores<N, D>(shared.v, shared.b[stage], ds, false);
    if constexpr (W::primal) {
      multiply_scores<N, D>(shared.k, shared.q_t[stage], p_t, false);
      multiply_scores<N, D>(shared.k_t, shared.q[stage], p_t, true);
      multiply_scores<N, D>(shared.v_t, shared.b[stage], ds_t, false);
    }
    if constexpr (W::with_a) multiply_scores<N, D>(shared.v, shared.a[stage], ds_t, true);
    wait(p, p_t, ds, ds_t);

    CUTE_UNROLL
    for (int j = 0; j < size<1>(p_rows); ++j) {
      const int n = int(get<1>(place(0, j)));
      const RowSums row = shared.row[stage][n];
      const int keys = shared.keys[stage][n];
      CUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool visible = first + int(get<0>(place(i, 0))) < keys;
        combine<W>(row, scale, visible, p_rows(i, j), p_t_rows(i, j), ds_rows(i, j), ds_t_rows(i, j));
      }
    }
    auto w = rounded(p), w_t = rounded(p_t), x = rounded(ds), x_t = rounded(ds_t);
    begin(dk, dv, dk_t, dv_t, w, w_t, x, x_t);
    if constexpr (W::primal) {
      multiply_sums<N, D>(w_t, shared.b[stage], dv);
      multiply_sums<N, D>(x_t, shared.q[stage], dk);
      multiply_sums<N, D>(x, shared.q_t[stage], dk);
    }
    if constexpr (W::with_a) multiply_sums<N, D>(w, shared.a[stage], dv);
    if constexpr (W::tangent) {
      multiply_sums<N, D>(w, shared.b[stage], dv_t);
      multiply_sums<N, D>(x, shared.q[stage], dk_t);
    }
    wait(dk, dv, dk_t, dv_t);
    __syncthreads();  // the stage may be filled again
  }
  const float scaled[2] = {scale, scale}, plain[2] = {1, 1};
  const int keys = int(c.keys);
  if constexpr (W::primal) {
    write_rows<D>(dk, scaled, c.dk, sample, kv_head, first, keys);
    write_rows<D>(dv, plain, c.dv, sample, kv_head, first, keys);
  }
  if constexpr (W::tangent) {
    write_rows<D>(dk_t, scaled, c.dk_t, sample, kv_head, first, keys);
    write_rows<D>(dv_t, plain, c.dv_t, sample, kv_head, first, keys);
  }
}

template <int D, class W>
void launch(const AttentionBackward& c, const float* sums) {
  const auto of_keys = [&](const View<3>& t) { return make_load<OWN, D>(t ? t : c.k, c.batch, c.kv_heads, c.keys); };
  const auto of_rows = [&](const View<3>& t) { return make_load<QUERIES, D>(t ? t : c.q, c.batch, c.heads, c.rows); };
  const Loads<D> loads{of_keys(c.k), of_keys(c.v), of_keys(c.k_t), of_keys(c.v_t),
                       of_rows(c.q), of_rows(c.b), of_rows(c.q_t), of_rows(c.a)};
  launch_blocks("attention_backward: keys", backward_keys_kernel<D, W>, c.keys, c.kv_heads, c.batch,
                sizeof(Shared<D, W>), c, loads, sums);
}

}  // namespace

void attention_backward_keys(const AttentionBackward& c, const float* sums) {
  if (!c.dk)
    c.d == 64 ? launch<64, Plain>(c, sums) : launch<128, Plain>(c, sums);
  else if (!c.dk_t)
    c.d == 64 ? launch<64, Double>(c, sums) : launch<128, Double>(c, sums);
  else if (c.d == 64)
    launch<64, Both>(c, sums);
  else {
    // four sums of 128 columns do not fit in registers
    launch<128, Primals>(c, sums);
    launch<128, Plain>(c, sums);
  }
}

}  // namespace cuda
}  // namespace gradmem
