// What the rows of y weigh in the backward pass, for all that comes after: a few lanes a row.
//
//   rows          (r, delta)     r = scale^p / norm, delta = dy . y: dw_ij = r (dy_i . v_j - delta_i). 0 where the normaliser is at its floor
//   from_start    2^a_i r        what the row weighs seen from before its chunk (not asked for without a state)
//   from_start_z  -delta 2^a_i r (not asked for without a Z)
//   from_block    (c, c delta)   c = 2^(a_i - a_before) r, `before` the token before its block of queries
//
// Rows at and beyond T weigh 0.
#pragma once
#include "power_gates.cuh"
#include "power_weights.cuh"
#include <vidrial/collective/reduce.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_back_rows(Args const& p) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  constexpr int kLanes = Tiles::lanes;
  int const lane = threadIdx.x % kLanes, row = blockIdx.x * Tiles::kRows + threadIdx.x / kLanes, head = blockIdx.y, batch = head / p.hq, q_head = head % p.hq;
  float r = p.weight_scale, delta = 0.f;
  if constexpr (Tiles::normalized) {
    if (row < p.t) {
      uint4 const y = *reinterpret_cast<uint4 const*>(p.y + batch * p.y_stride[0] + row * p.y_stride[1] + q_head * p.y_stride[2] + lane * 8);
      uint4 const dy = *reinterpret_cast<uint4 const*>(p.dy + batch * p.dy_stride[0] + row * p.dy_stride[1] + q_head * p.dy_stride[2] + lane * 8);
      uint32_t const a[4] = {y.x, y.y, y.z, y.w}, b[4] = {dy.x, dy.y, dy.z, dy.w};
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) delta += Pair::low(a[i]) * Pair::low(b[i]) + Pair::high(a[i]) * Pair::high(b[i]);
    }
    delta = reduce_lanes<kLanes>(delta, Add{});
    float const norm = row < p.t ? p.norm[int64_t(head) * p.t + row] : 0.f;
    bool const floor = norm <= kLowestNormaliser;
    r = floor ? 0.f : r / norm;
    delta = floor ? 0.f : delta;
  }
  if (row >= p.t) r = 0.f;
  if (lane > 0 || row >= p.padded) return;
  int64_t const place = int64_t(head) * p.padded + row;
  float start = r, block = r;
  if constexpr (Tiles::gated) {
    float2 const* gates = p.a + int64_t(head / p.group) * p.padded;
    int const before = row / p.block * p.block - 1;
    float2 const a = gates[row], b = (before + 1) % p.chunk ? gates[before] : make_float2(0.f, 0.f);
    start *= exp2_approx(a.x + a.y);
    block *= exp2_approx(diff_split(a, b));
  }
  p.rows[place] = make_float2(r, delta);
  p.from_block[place] = make_float2(block, block * delta);
  if constexpr (Tiles::stateful) {
    p.from_start[place] = start;
    if (Tiles::keeps_z) p.from_start_z[place] = -delta * start;
  }
}

}  // namespace vidrial
