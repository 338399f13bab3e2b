// Gates of power retention: one CTA a chunk of one head turns log gates into the decays that the other kernels multiply by.
//
//   a_t       sum of log2 gates from the chunk's start to t, inclusive, as an unevaluated sum of two floats: differences of
//             neighbours stay exact however long the chunk is and however strong the gates are
//   to_end    2^(a_end - a_t)        what token t still counts at the chunk's end
//   to_block  2^(a_blockend - a_t)   and at the end of its block of keys
//
// Tokens at and beyond T have gate 1.
#pragma once
#include <vidrial/smem.cuh>

namespace vidrial {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLowestLogGate = -60.f;        // exp(-60): below, a token is forgotten at once

CUTE_DEVICE float2 split(double x) { float const high = float(x); return make_float2(high, float(x - double(high))); }

// The difference of two split sums.
CUTE_DEVICE float minus(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }

template <class Tiles, class Args>
CUTE_DEVICE void power_gates(Args const& p) {
  constexpr int kThreads = Tiles::threads, kWarps = kThreads / 32;
  __shared__ double sums[kWarps];
  int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int const first = blockIdx.x * p.chunk, head = blockIdx.y;
  float const* log_g = p.log_g + int64_t(head / p.h) * p.log_g_stride[0] + (head % p.h) * p.log_g_stride[2];
  int64_t const row = int64_t(head) * gridDim.x * p.chunk + first;

  double carry = 0;
  CUTE_NO_UNROLL
  for (int s = 0; s < p.chunk; s += kThreads) {
    int const t = first + s + thread;
    double x = s + thread < p.chunk && t < p.t ? double(fmaxf(log_g[t * p.log_g_stride[1]], kLowestLogGate)) * 1.44269504088896340736 : 0.0;
    CUTE_UNROLL
    for (int d = 1; d < 32; d *= 2) {
      double const y = __shfl_up_sync(~0u, x, d);
      if (lane >= d) x += y;
    }
    if (lane == 31) sums[warp] = x;
    __syncthreads();
    double total = 0;
    CUTE_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) x += sums[w];
      total += sums[w];
    }
    if (s + thread < p.chunk) p.a[row + s + thread] = split(carry + x);
    carry += total;
    __syncthreads();
  }
  // NOTE: the sums of the last token of a block are read by other threads than wrote them.
  __threadfence_block();
  __syncthreads();
  float2 const end = split(carry);
  CUTE_NO_UNROLL
  for (int s = thread; s < p.chunk; s += kThreads) {
    float2 const a = p.a[row + s];
    p.to_end[row + s] = exp2_approx(minus(end, a));
    p.to_block[row + s] = exp2_approx(minus(p.a[row + (s / p.block + 1) * p.block - 1], a));
  }
}

}  // namespace vidrial
