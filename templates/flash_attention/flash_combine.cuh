// Attention over parts of the keys becomes attention over all of them: y = sum_s exp(lse_s - lse) y_s, lse = log sum_s exp(lse_s).
//
// A warp owns a row; lane s has the lse of part s. The order of the sums is fixed, so that results repeat to the bit.
#pragma once
#include <vidrial/arch/ptx.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void flash_combine(Args const& p) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  constexpr int kPairs = Tiles::e / 2, kSteps = (kPairs + 31) / 32;      // pairs of columns, 32 at once
  constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  int const lane = threadIdx.x % 32, row = blockIdx.x * (Tiles::threads / 32) + threadIdx.x / 32;
  if (row >= p.all_rows) return;
  float const infinity = bits_as_float(0x7f800000u);

  float const lse = lane < p.splits ? p.part_lse[int64_t(lane) * p.all_rows + row] : -infinity;
  float largest = lse;
  CUTE_UNROLL
  for (int i = 16; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
  float const weight = exp2_approx((lse - (largest == -infinity ? 0.f : largest)) * kLog2E);
  float sum = weight;
  CUTE_UNROLL
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);

  float2 y[kSteps] = {};
  float const* part = p.parts + int64_t(row) * Tiles::e;
  CUTE_NO_UNROLL
  for (int s = 0; s < p.splits; ++s, part += int64_t(p.all_rows) * Tiles::e) {
    float const w = __shfl_sync(~0u, weight, s);
    CUTE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      int const pair = lane + 32 * i;
      if (pair < kPairs) {
        float2 const x = reinterpret_cast<float2 const*>(part)[pair];
        y[i].x += w * x.x;
        y[i].y += w * x.y;
      }
    }
  }

  // Rows are [b, hq, tq], as lse has them.
  int const column = row / p.tq, query = row - column * p.tq, batch = column / p.hq, head = column - batch * p.hq;
  float const factor = sum == 0.f ? 0.f : reciprocal_approx(sum);        // of a row that sees no key: 0
  auto* const target = p.y + batch * p.y_stride[0] + query * p.y_stride[1] + head * p.y_stride[2];
  CUTE_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    int const pair = lane + 32 * i;
    if (pair < kPairs) reinterpret_cast<uint32_t*>(target)[pair] = Pair::pack(y[i].x * factor, y[i].y * factor);
  }
  if (lane == 0) p.lse[row] = largest + kLn2 * __log2f(sum);
}

}  // namespace vidrial
