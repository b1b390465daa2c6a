// Attention's backward and dual backward on Hopper: the sums over a row, then queries and keys, each with a kernel.

#include "attention_backward_sm90.cuh"

namespace gradmem {
namespace cuda {
namespace {

constexpr int WARPS = 8;

// D = sum(b * o), D_t = sum(a * o + b * o_t); a warp to a row.
__global__ void row_sums_kernel(const __grid_constant__ AttentionBackward c, float* sums) {
  const Index all = c.batch * c.heads * c.rows, at = Index(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (at >= all) return;
  const Index row = at % c.rows, head = at / c.rows % c.heads, sample = at / c.rows / c.heads;
  const int lane = threadIdx.x % 32;
  const auto element = [&](const View<3>& t, int j) {
    const T* base = static_cast<const T*>(t.data);
    return float(base[sample * t.strides[0] + head * t.strides[1] + row * t.strides[2] + j]);
  };
  float d = 0, d_t = 0;
  for (int j = lane; j < c.d; j += 32) {
    const float o = element(c.o, j), b = element(c.b, j);
    d += b * o;
    if (c.a.data != nullptr) d_t += element(c.a, j) * o;
    if (c.o_t.data != nullptr) d_t += element(c.o_t, j) * b;
  }
  for (int step = 16; step > 0; step /= 2) {
    d += __shfl_xor_sync(0xffffffff, d, step);
    d_t += __shfl_xor_sync(0xffffffff, d_t, step);
  }
  if (lane == 0) {
    sums[at] = d;
    sums[all + at] = d_t;
  }
}

}  // namespace

void attention_backward(const AttentionBackward& c) {
  float* sums = static_cast<float*>(target().workspace);
  const Index blocks = (c.batch * c.heads * c.rows + WARPS - 1) / WARPS;
  launch("attention_backward: row sums", row_sums_kernel, blocks, 32 * WARPS, c, sums);
  if (c.dq || c.dq_t) attention_backward_queries(c, sums);
  if (c.dk || c.dk_t) attention_backward_keys(c, sums);
}

}  // namespace cuda
}  // namespace gradmem
