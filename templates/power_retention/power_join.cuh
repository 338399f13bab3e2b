// What a state carried into a segment of a scan adds to the snapshots there: shared by power_states and power_back_carry. Memory-bound,
// in float: a thread owns 8 neighbouring elements of one head's state and goes through all segments; writes do not overlap.
#pragma once
#include "power_gates.cuh"

namespace vidrial {

constexpr int kJoined = 8;                             // elements of a thread

// snapshot(n) += decay carry for the chunks [first, last), where decay falls by decay_of(n) behind each; what it is behind the last one.
template <class Snapshot, class DecayOf>
CUTE_DEVICE float add_carry(float const (&carry)[kJoined], float decay, int first, int last, Snapshot&& snapshot, DecayOf&& decay_of) {
  constexpr int kInFlight = 4;
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
      if (before[i] == 0.f) break;                     // forgotten: x + 0 is x
      uint32_t const x[4] = {old[i].x, old[i].y, old[i].z, old[i].w};
      uint32_t y[4];
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) y[j] = pack_bf16(low_bf16(x[j]) + before[i] * carry[2 * j], high_bf16(x[j]) + before[i] * carry[2 * j + 1]);
      *snapshot(n + i) = make_uint4(y[0], y[1], y[2], y[3]);
    }
  }
  return decay;
}

// C_1 = end_0,  C_{s+1} = end_s + decay(segment s) C_s,  snapshot_n += decay(segment start .. n) C_s. `end(s)`: 8 elements of what segment s adds.
template <class End, class Snapshot, class DecayOf>
CUTE_DEVICE void join_segments(int chunks, int segments, End&& end, Snapshot&& snapshot, DecayOf&& decay_of) {
  int const per_segment = (chunks + segments - 1) / segments;
  float carry[kJoined] = {};
  float decay = 0.f;                                   // of the carry over the segment before: before the first there is none
  for (int first = per_segment, s = 0; first < chunks; first += per_segment, ++s) {
    float4 const low = end(s)[0], high = end(s)[1];
    float const add[kJoined] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    CUTE_UNROLL
    for (int i = 0; i < kJoined; ++i) carry[i] = add[i] + decay * carry[i];
    decay = add_carry(carry, 1.f, first, min(first + per_segment, chunks), snapshot, decay_of);
  }
}

}  // namespace vidrial
