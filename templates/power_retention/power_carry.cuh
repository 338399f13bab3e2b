// Joins the segments of power_scan: every snapshot of a later segment gets what the earlier ones carry into it.
//
//   C_1 = end_0,  C_{s+1} = end_s + decay(segment s) C_s,  snapshot_n += decay(segment start .. n) C_s
//
// Memory-bound: a thread owns 8 neighbouring elements of one head's state in one segment. It works out C_s for itself.
#pragma once
#include "power_gates.cuh"

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_carry(Args const& p) {
  constexpr int kVector = 8, kInFlight = 4;
  int const element = (blockIdx.x * Tiles::threads + threadIdx.x) * kVector, segment = blockIdx.y + 1, head = blockIdx.z;
  int const chunks = (p.t + p.chunk - 1) / p.chunk, per_segment = (chunks + p.segments - 1) / p.segments;
  int const first = segment * per_segment, last = min(first + per_segment, chunks);
  if (element >= Tiles::snapshot || first >= last) return;
  float2 const* a = p.a + int64_t(head) * chunks * p.chunk;
  auto decay_of = [&](int n) {
    if (!Tiles::gated) return 1.f;
    float2 const total = a[int64_t(n + 1) * p.chunk - 1];
    return exp2_approx(total.x + total.y);
  };
  float carry[kVector] = {};
  for (int s = 0; s < segment; ++s) {
    float decay = 1.f;
    if (s > 0) {
      for (int n = s * per_segment; n < (s + 1) * per_segment; ++n) decay *= decay_of(n);
    }
    float4 const* end = reinterpret_cast<float4 const*>(p.ends + (int64_t(head) * (p.segments - 1) + s) * Tiles::snapshot + element);
    float4 const low = end[0], high = end[1];
    float const add[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) carry[i] = add[i] + decay * carry[i];
  }
  auto snapshot = [&](int n) { return reinterpret_cast<uint4*>(p.snapshots + (int64_t(head) * chunks + n) * Tiles::snapshot + element); };
  float decay = 1.f;
  // NOTE: once the gates have forgotten a segment's past altogether, its later snapshots stay as they are: x + 0 is x.
  for (int n = first; n < last && decay > 0.f; n += kInFlight) {
    // NOTE: all loads before any store: the compiler cannot know that they do not meet.
    uint4 old[kInFlight];
    CUTE_UNROLL
    for (int i = 0; i < kInFlight; ++i) old[i] = n + i == first || n + i >= last ? make_uint4(0, 0, 0, 0) : *snapshot(n + i);
    CUTE_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (n + i >= last) break;
      uint32_t const x[4] = {old[i].x, old[i].y, old[i].z, old[i].w};
      uint32_t y[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) y[j] = pack_bf16(low_bf16(x[j]) + decay * carry[2 * j], high_bf16(x[j]) + decay * carry[2 * j + 1]);
      *snapshot(n + i) = make_uint4(y[0], y[1], y[2], y[3]);
      decay *= decay_of(n + i);
    }
  }
}

}  // namespace vidrial
