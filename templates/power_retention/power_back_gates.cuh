// The gradient of the log gates: one CTA a chunk of one head.
//
//   dlog_g_t = sum over t' >= t in the chunk of (sum over the group of q.dq - k.dk) / p  +  <L, S> at the chunk's end
//
// A weight is homogeneous of degree p in q and in k, so q.dq / p is what a row's own gate sum is worth as a query, k.dk / p as a key. The sum stops at
// the chunk: errors of q.dq, which come from S, and of k.dk, from L, do not cancel, and over a long sequence they would add up.
#pragma once
#include "power_gates.cuh"

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_back_gates(Args const& p) {
  constexpr int kThreads = Tiles::threads, kWarps = kThreads / 32, kTokens = 4;
  __shared__ double sums[kWarps];
  int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32, chunk = blockIdx.x, head = blockIdx.y, batch = head / p.h, kv_head = head % p.h;
  int const first = chunk * p.chunk, tokens = min(p.chunk, p.t - first), padded = p.chunks * p.chunk;
  double carry = Tiles::stateful && (Tiles::leaves || chunk + 1 < p.chunks) ? p.cross[int64_t(head) * p.chunks + chunk] : 0.f;
  CUTE_NO_UNROLL
  for (int s = 0; s < tokens; s += kThreads * kTokens) {
    double x[kTokens], sum = 0;                    // from the last token on
    CUTE_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      int const t = first + tokens - 1 - (s + thread * kTokens + i);
      if (t >= first) {
        float dots = -p.dot_k[int64_t(head) * padded + t];
        for (int g = 0; g < p.group; ++g) dots += p.dot_q[(int64_t(head) * p.group + g) * padded + t];
        sum += double(dots) / Tiles::degree;
      }
      x[i] = sum;
    }
    double prefix = sum;
    CUTE_UNROLL
    for (int d = 1; d < 32; d *= 2) {
      double const y = __shfl_up_sync(~0u, prefix, d);
      if (lane >= d) prefix += y;
    }
    if (lane == 31) sums[warp] = prefix;
    __syncthreads();
    // NOTE: the sum of the threads before, not this thread's minus its own part: NaN minus NaN is no 0.
    double const before = __shfl_up_sync(~0u, prefix, 1);
    prefix = lane > 0 ? carry + before : carry;
    CUTE_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) prefix += sums[w];
      carry += sums[w];
    }
    CUTE_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      int const t = first + tokens - 1 - (s + thread * kTokens + i);
      if (t >= first) {
        float const gate = p.log_g[batch * p.log_g_stride[0] + t * p.log_g_stride[1] + kv_head * p.log_g_stride[2]];
        // Where the gate is clamped nothing depends on it.
        p.dlog_g[(int64_t(batch) * p.t + t) * p.h + kv_head] = gate <= kLowestLogGate || gate > 0.f ? 0.f : float(prefix + x[i]);
      }
    }
    __syncthreads();
  }
}

}  // namespace vidrial
