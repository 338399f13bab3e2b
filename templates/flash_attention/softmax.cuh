// Softmax over blocks of keys, for the two rows that a thread holds a part of: r and r + 8 of an accumulator.
//
// The reference of a row, which its scores are taken relative to, is any number within 2^kMargin of the row's largest score so far. It moves
// only where a score exceeds it by more, so that nearly always neither the quads talk nor is the output rescaled. This is exact: weights and
// sums are relative to the reference, in float32; rounded to 16 bits, a weight keeps its relative precision.
#pragma once
#include <vidrial/arch/ptx.cuh>

namespace vidrial {

constexpr float kMargin = 8.f;
CUTE_DEVICE float infinity() { return bits_as_float(0x7f800000u); }

template <int N>
struct Softmax {
  float const to_log2;                               // scores times this are logarithms to base 2
  float largest[2], limit[2], shift[2] = {}, sum[2] = {};
  float scale[2];                                    // what all before is worth since the reference moved
  bool moved = false;

  CUTE_DEVICE explicit Softmax(float to_log2) : to_log2(to_log2) {
    largest[0] = largest[1] = limit[0] = limit[1] = -infinity();
  }

  // The largest score of this thread's own columns.
  CUTE_DEVICE static void maxima(float const (&s)[N][4], float (&best)[2]) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float even = fmaxf(s[0][2 * h], s[0][2 * h + 1]), odd = fmaxf(s[1][2 * h], s[1][2 * h + 1]);
      CUTE_UNROLL
      for (int n = 2; n < N; n += 2) even = fmaxf(fmaxf(even, s[n][2 * h]), s[n][2 * h + 1]);
      CUTE_UNROLL
      for (int n = 3; n < N; n += 2) odd = fmaxf(fmaxf(odd, s[n][2 * h]), s[n][2 * h + 1]);
      best[h] = fmaxf(even, odd);
    }
  }

  // Rare: the largest score so far becomes the reference, of both rows in all lanes of the quads.
  CUTE_DEVICE void refer(float (&best)[2]) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float b = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
      b = fmaxf(fmaxf(b, __shfl_xor_sync(~0u, b, 2)), largest[h]);
      shift[h] = b == -infinity() ? 0.f : b * to_log2;
      scale[h] = exp2_approx(largest[h] * to_log2 - shift[h]);
      sum[h] *= scale[h];
      limit[h] = b + kMargin / to_log2;
      largest[h] = b;
    }
  }

  // Scores become weights, in place.
  CUTE_DEVICE void weights(float (&s)[N][4]) {
    float best[2];
    maxima(s, best);
    moved = __any_sync(~0u, best[0] > limit[0] || best[1] > limit[1]);
    if (moved) refer(best);
    CUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      CUTE_UNROLL
      for (int e = 0; e < 4; ++e) s[n][e] = exp2_approx(fmaf(s[n][e], to_log2, -shift[e / 2]));
    }
    CUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      CUTE_UNROLL
      for (int e = 0; e < 4; ++e) sum[e / 2] += s[n][e];
    }
  }

  template <int M>
  CUTE_DEVICE void rescale(float (&o)[M][4]) const {
    if (!moved) return;
    CUTE_UNROLL
    for (int n = 0; n < M; ++n) {
      CUTE_UNROLL
      for (int e = 0; e < 4; ++e) o[n][e] *= scale[e / 2];
    }
  }

  // The sums of whole rows, in all lanes of the quads.
  CUTE_DEVICE void finish() {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }
  // What the output is multiplied by: a row that sees no key gives 0.
  CUTE_DEVICE float factor(int h) const { return sum[h] == 0.f ? 0.f : reciprocal_approx(sum[h]); }
  // log of the sum of the exponentials, natural; -infinity of a row that sees no key.
  CUTE_DEVICE float log_sum(int h) const { return 0.6931471805599453f * ((sum[h] == 0.f ? -infinity() : largest[h] * to_log2) + __log2f(sum[h])); }
};

}  // namespace vidrial
