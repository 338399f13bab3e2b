// Joins the segments of power_scan: every snapshot of a later segment gets what the earlier ones carry into it.
//
//   C_1 = end_0,  C_{s+1} = end_s + decay(segment s) C_s,  snapshot_n += decay(segment start .. n) C_s
//
// Memory-bound: a thread owns 8 neighbouring elements of one head's state and goes through all segments. Each end is read once, and of the
// snapshots none that the gates let nothing reach.
//
// NOTE: join_segments of power_join.cuh says the same, and takes this one's place when the forward pass is swept again: by it the kernel has one
// instruction more, and rankings hold for the code that was measured.
#pragma once
#include "power_gates.cuh"

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_carry(Args const& p) {
  constexpr int kVector = 8, kInFlight = 4;
  int const element = (blockIdx.x * Tiles::threads + threadIdx.x) * kVector, head = blockIdx.z;
  int const chunks = (p.t + p.chunk - 1) / p.chunk, per_segment = (chunks + p.segments - 1) / p.segments;
  if (element >= Tiles::snapshot) return;
  float2 const* a = p.a + int64_t(head) * chunks * p.chunk;
  auto decay_of = [&](int n) {
    if (!Tiles::gated) return 1.f;
    float2 const total = a[int64_t(n + 1) * p.chunk - 1];
    return exp2_approx(total.x + total.y);
  };
  auto snapshot = [&](int n) { return reinterpret_cast<uint4*>(p.snapshots + (int64_t(head) * chunks + n) * Tiles::snapshot + element); };
  auto end = [&](int s) { return reinterpret_cast<float4 const*>(p.ends + (int64_t(head) * (p.segments - 1) + s) * Tiles::snapshot + element); };
  float carry[kVector] = {};
  float decay = 0.f;                                   // of the carry over the segment before: before the first there is none
  for (int first = per_segment, s = 0; first < chunks; first += per_segment, ++s) {
    float4 const low = end(s)[0], high = end(s)[1];
    float const add[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) carry[i] = add[i] + decay * carry[i];
    int const last = min(first + per_segment, chunks);
    decay = 1.f;
    for (int n = first; n < last && decay != 0.f; n += kInFlight) {
      float before[kInFlight];
      CUTE_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        before[i] = n + i < last ? decay : 0.f;
        if (n + i < last) decay *= decay_of(n + i);
      }
      // NOTE: all loads before any store: the compiler cannot know that they do not meet. A segment's own first snapshot is written here only.
      uint4 old[kInFlight];
      CUTE_UNROLL
      for (int i = 0; i < kInFlight; ++i) old[i] = n + i == first || before[i] == 0.f ? make_uint4(0, 0, 0, 0) : *snapshot(n + i);
      CUTE_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if (before[i] == 0.f) break;                   // forgotten: x + 0 is x
        uint32_t const x[4] = {old[i].x, old[i].y, old[i].z, old[i].w};
        uint32_t y[4];
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) y[j] = pack_bf16(low_bf16(x[j]) + before[i] * carry[2 * j], high_bf16(x[j]) + before[i] * carry[2 * j + 1]);
        *snapshot(n + i) = make_uint4(y[0], y[1], y[2], y[3]);
      }
    }
  }
}

}  // namespace vidrial
