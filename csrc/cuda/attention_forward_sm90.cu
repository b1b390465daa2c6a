// Attention's forward and dual forward on Hopper: o, lse, and with tangents o_t, mu. Formulas: docs/attention.md.

#include "attention_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

// Keys of a tile.
constexpr int KEYS = 64;

template <int D, bool DUAL>
struct Shared {
  alignas(1024) T q[OWN * D];
  alignas(1024) T q_t[DUAL ? OWN * D : 8];
  alignas(1024) T k[STAGES][KEYS * D];
  alignas(1024) T v[STAGES][KEYS * D];
  alignas(1024) T k_t[STAGES][DUAL ? KEYS * D : 8];
  alignas(1024) T v_t[STAGES][DUAL ? KEYS * D : 8];
  Barrier::ValueType rows_there, keys_there[STAGES];
};

template <int D>
struct Loads {
  Load<OWN, D> q, q_t;
  Load<KEYS, D> k, k_t, v, v_t;
};

// A block of 128 rows of one head.
template <int D, bool DUAL>
__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ AttentionForward c, const __grid_constant__ Loads<D> loads) {
  auto& shared = *reinterpret_cast<Shared<D, DUAL>*>(shared_memory());
  const int heads = int(c.heads), rows = int(c.rows);
  const float scale = float(c.scale);
  const Seen see = seen(c, blockIdx.z);
  const QueryBlock own = query_block<KEYS>(c, see);
  const int b = own.sample, head = own.head, kv_head = own.kv_head, block = own.block;
  const int first = own.first, tiles = own.tiles;

  const auto load_keys = [&](int tile) {
    const int stage = tile % STAGES;
    auto* there = &shared.keys_there[stage];
    Barrier::arrive_and_expect_tx(there, (DUAL ? 4 : 2) * KEYS * D * sizeof(T));
    const auto load = [&](const Load<KEYS, D>& from, T* to) {
      load_tile<KEYS, D>(from, int(c.batch), int(c.kv_heads), int(c.keys), b, kv_head, tile, to, there);
    };
    load(loads.k, shared.k[stage]);
    load(loads.v, shared.v[stage]);
    if constexpr (DUAL) load(loads.k_t, shared.k_t[stage]);
    if constexpr (DUAL) load(loads.v_t, shared.v_t[stage]);
  };
  start_barriers(shared.rows_there, shared.keys_there);
  if (threadIdx.x == 0 && tiles > 0) {
    Barrier::arrive_and_expect_tx(&shared.rows_there, (DUAL ? 2 : 1) * OWN * D * sizeof(T));
    load_tile<OWN, D>(loads.q, int(c.batch), heads, rows, b, head, block, shared.q, &shared.rows_there);
    if constexpr (DUAL)
      load_tile<OWN, D>(loads.q_t, int(c.batch), heads, rows, b, head, block, shared.q_t, &shared.rows_there);
    load_keys(0);
  }

  auto o = sums_fragment<KEYS, D>(), o_t = sums_fragment<KEYS, D>();
  auto s = scores_fragment<KEYS, D>(), s_t = scores_fragment<KEYS, D>();
  const auto place = places<Scores<KEYS, D>, KEYS>();
  const auto s_rows = make_tensor(s.data(), as_rows(s.layout()));
  const auto s_t_rows = make_tensor(s_t.data(), as_rows(s_t.layout()));
  const auto o_rows = make_tensor(o.data(), as_rows(o.layout()));
  const auto o_t_rows = make_tensor(o_t.data(), as_rows(o_t.layout()));
  // of a thread's two rows: the keys they see; the largest score; the sums of p and p * s_t, of a thread's own keys
  int keys[2];
  float top[2] = {-INFINITE, -INFINITE}, total[2] = {0, 0}, moved[2] = {0, 0};
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) keys[i] = see.keys_of(first + int(get<0>(place(i, 0))));

  if (tiles > 0) Barrier::wait(&shared.rows_there, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % STAGES;
    if (threadIdx.x == 0 && tile + 1 < tiles) load_keys(tile + 1);
    Barrier::wait(&shared.keys_there[stage], tile / STAGES % 2);

    begin(s, s_t);
    multiply_scores<KEYS, D>(shared.q, shared.k[stage], s, false);
    if constexpr (DUAL) {
      multiply_scores<KEYS, D>(shared.q_t, shared.k[stage], s_t, false);
      multiply_scores<KEYS, D>(shared.q, shared.k_t[stage], s_t, true);
    }
    wait(s, s_t);

    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      float here = -INFINITE;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(s_rows); ++j) {
        float& x = s_rows(i, j);
        x = tile * KEYS + int(get<1>(place(i, j))) < keys[i] ? x * (scale * LOG2E) : -INFINITE;
        here = fmaxf(here, x);
      }
      here = fmaxf(top[i], row_max(here));
      const float base = here == -INFINITE ? 0 : here, before = exp2f(top[i] - base);
      top[i] = here;
      total[i] *= before;
      moved[i] *= before;
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o_rows); ++j) {
        o_rows(i, j) *= before;
        if constexpr (DUAL) o_t_rows(i, j) *= before;
      }
      CUTE_UNROLL
      for (int j = 0; j < size<1>(s_rows); ++j) {
        const float p = exp2f(s_rows(i, j) - base);
        s_rows(i, j) = p;
        total[i] += p;
        if constexpr (DUAL) {
          const float p_s_t = p * s_t_rows(i, j) * scale;
          s_t_rows(i, j) = p_s_t;
          moved[i] += p_s_t;
        }
      }
    }

    auto p = rounded(s), p_s_t = rounded(s_t);
    begin(o, o_t, p, p_s_t);
    multiply_sums<KEYS, D>(p, shared.v[stage], o);
    if constexpr (DUAL) multiply_sums<KEYS, D>(p_s_t, shared.v[stage], o_t);
    if constexpr (DUAL) multiply_sums<KEYS, D>(p, shared.v_t[stage], o_t);
    wait(o, o_t);
    __syncthreads();  // the stage may be filled again
  }

  float inverse[2];
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float sum = row_sum(total[i]), mean = row_sum(moved[i]);
    inverse[i] = sum == 0 ? 0 : 1 / sum;
    const int row = first + int(get<0>(place(i, 0)));
    if (row < rows && threadIdx.x % 4 == 0) {
      const Index at = (Index(b) * heads + head) * rows + row;
      static_cast<float*>(c.lse)[at] = sum == 0 ? INFINITE : top[i] * LN2 + logf(sum);
      if constexpr (DUAL) static_cast<float*>(c.mu)[at] = mean * inverse[i];
    }
    if constexpr (DUAL)
      CUTE_UNROLL
      for (int j = 0; j < size<1>(o_rows); ++j) o_t_rows(i, j) -= mean * inverse[i] * o_rows(i, j);
  }
  write_rows<D>(o, inverse, c.o, b, head, first, rows);
  if constexpr (DUAL) write_rows<D>(o_t, inverse, c.o_t, b, head, first, rows);
}

template <int D, bool DUAL>
void launch(const AttentionForward& c) {
  const auto rows = [&](const View<3>& t) { return make_load<OWN, D>(t ? t : c.q, c.batch, c.heads, c.rows); };
  const auto keys = [&](const View<3>& t) { return make_load<KEYS, D>(t ? t : c.k, c.batch, c.kv_heads, c.keys); };
  const Loads<D> loads{rows(c.q), rows(c.q_t), keys(c.k), keys(c.k_t), keys(c.v), keys(c.v_t)};
  launch_blocks("attention_forward", forward_kernel<D, DUAL>, c.rows, c.heads, c.batch, sizeof(Shared<D, DUAL>), c,
                loads);
}

}  // namespace

// Either all tangents are there or none.
void attention_forward(const AttentionForward& c) {
  if (c.d == 64)
    c.q_t ? launch<64, true>(c) : launch<64, false>(c);
  else
    c.q_t ? launch<128, true>(c) : launch<128, false>(c);
}

}  // namespace cuda
}  // namespace gradmem
