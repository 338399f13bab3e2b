// Gates of power retention: one CTA a chunk of one head turns log gates into the decays that the other kernels multiply by.
//
//   a_t       sum of log2 gates from the chunk's start to t, inclusive, as an unevaluated sum of two floats: differences of
//             neighbours stay exact however long the chunk is and however strong the gates are
//   to_end    2^(a_end - a_t)        what token t still counts at the chunk's end (not asked for without a state)
//   to_block  2^(a_blockend - a_t)   and at the end of its block of keys
//
// Tokens at and beyond T have gate 1. A NaN gate makes NaN of every sum that it is in, and of none before it.
#pragma once
#include <vidrial/tile/smem.cuh>

namespace vidrial {

constexpr double kLog2E = 1.44269504088896340736;
constexpr float kLowestLogGate = -60.f;        // exp(-60): below, a token is forgotten at once

CUTE_DEVICE float2 split_double(double x) { float const high = float(x); return make_float2(high, float(x - double(high))); }

// The difference of two split sums.
CUTE_DEVICE float diff_split(float2 a, float2 b) { return (a.x - b.x) + (a.y - b.y); }

// NOTE: no fmaxf, which takes NaN for the other operand: a gate that is none would count as closed.
CUTE_DEVICE float clamp_log_gate(float x) { return x < kLowestLogGate ? kLowestLogGate : x > 0.f ? 0.f : x; }

// The tokens of one sequence: `length()` of them, from token `start()` of entry `batch` of the arrays on. Fetches go by this alone: sequences that
// lie packed behind one another are to be another Sequence, not another path.
template <class Args>
struct Sequence {
  Args const& p;
  int batch;
  CUTE_DEVICE int start() const { return 0; }
  CUTE_DEVICE int length() const { return p.t; }
  template <class T, class Token>
  CUTE_DEVICE T* at(T* x, int64_t const (&stride)[3], Token token, int head) const {
    return x + batch * stride[0] + (start() + token) * stride[1] + head * stride[2];
  }
};

template <class Tiles, class Args>
CUTE_DEVICE void power_gates(Args const& p) {
  constexpr int kThreads = Tiles::threads, kWarps = kThreads / 32, kTokens = 4;
  __shared__ double sums[kWarps];
  int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int const first = blockIdx.x * p.chunk, head = blockIdx.y;
  Sequence<Args> const sequence{p, head / p.h};
  float const* log_g = sequence.at(p.log_g, p.log_g_stride, 0, head % p.h);
  int64_t const row = int64_t(head) * gridDim.x * p.chunk + first;

  double carry = 0;
  CUTE_NO_UNROLL
  for (int s = 0; s < p.chunk; s += kThreads * kTokens) {
    int const own = s + thread * kTokens;
    double x[kTokens], sum = 0;
    CUTE_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      int const t = first + own + i;
      sum += own + i < p.chunk && t < sequence.length() ? double(clamp_log_gate(log_g[t * p.log_g_stride[1]])) * kLog2E : 0.0;
      x[i] = sum;
    }
    double prefix = sum;                     // of the warp's threads up to this one, then of all tokens before its own
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
    if (own < p.chunk) {
      float4* a = reinterpret_cast<float4*>(p.a + row + own);
      CUTE_UNROLL
      for (int i = 0; i < kTokens; i += 2) {
        float2 const a0 = split_double(prefix + x[i]), a1 = split_double(prefix + x[i + 1]);
        a[i / 2] = make_float4(a0.x, a0.y, a1.x, a1.y);
      }
    }
    __syncthreads();
  }
  // The last token of a block of keys was another thread's.
  float2 const end = split_double(carry);
  CUTE_NO_UNROLL
  for (int s = thread * kTokens; s < p.chunk; s += kThreads * kTokens) {
    float2 const block_end = p.a[row + (s / p.block + 1) * p.block - 1];
    float to_end[kTokens], to_block[kTokens];
    CUTE_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      float2 const a = p.a[row + s + i];
      to_end[i] = exp2_approx(diff_split(end, a));
      to_block[i] = exp2_approx(diff_split(block_end, a));
    }
    if (p.to_end) *reinterpret_cast<float4*>(p.to_end + row + s) = make_float4(to_end[0], to_end[1], to_end[2], to_end[3]);
    *reinterpret_cast<float4*>(p.to_block + row + s) = make_float4(to_block[0], to_block[1], to_block[2], to_block[3]);
  }
}

}  // namespace vidrial
