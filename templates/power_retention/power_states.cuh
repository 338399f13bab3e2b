// The state before the first token on its way into every chunk, and the one behind the last token: power_carry's place where there is either.
//
//   C_0 = S_initial,  C_{s+1} = end_s + decay(segment s) C_s,  snapshot_n += decay(segment start .. n) C_s,  S_final = C of all segments
//
// Memory-bound, in float: a thread owns 8 neighbouring elements of one head's state and goes through all segments. Snapshots have the multiplicity 2
// in the pair tiles of I < J, what a caller gives and takes has not. Of Z the symmetric part counts.
#pragma once
#include "power_gates.cuh"
#include "power_tokens.cuh"

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_states(Args const& p) {
  constexpr int kVector = 8, kInFlight = 4, D = Tiles::d, E = Tiles::e, kZ = D * D, kTile = 64 * E;
  int const element = (blockIdx.x * Tiles::threads + threadIdx.x) * kVector, head = blockIdx.z, row = element / D, column = element % D;
  int const chunks = (p.t + p.chunk - 1) / p.chunk, per_segment = (chunks + p.segments - 1) / p.segments;
  if (element >= Tiles::snapshot) return;
  bool const is_z = element < kZ;
  int2 const pair = is_z ? make_int2(0, 0) : block_pair((element - kZ) / kTile, D / 8);
  float const count = pair.x == pair.y ? 1.f : 2.f;
  int64_t const in_z = int64_t(head) * kZ, in_s = int64_t(head) * (Tiles::snapshot - kZ) + element - kZ;
  auto decay_of = [&](int n) {
    if (!Tiles::gated) return 1.f;
    float2 const total = p.a[(int64_t(head) * chunks + n + 1) * p.chunk - 1];
    return exp2_approx(total.x + total.y);
  };
  auto snapshot = [&](int n) { return reinterpret_cast<uint4*>(p.snapshots + (int64_t(head) * chunks + n) * Tiles::snapshot + element); };
  int const ends = p.segments - (Tiles::leaves ? 0 : 1);
  float carry[kVector] = {};
  if constexpr (Tiles::enters) {
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      carry[i] = is_z ? 0.5f * (p.initial_z[in_z + element + i] + p.initial_z[in_z + (column + i) * D + row]) : count * p.initial_s[in_s + i];
    }
  }
  float decay = Tiles::enters ? 1.f : 0.f;                // of the carry up to the chunk
  for (int first = 0, s = 0; first < chunks; first += per_segment, ++s) {
    int const last = min(first + per_segment, chunks);
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
        if (before[i] == 0.f) break;                       // forgotten: x + 0 is x
        uint32_t const x[4] = {old[i].x, old[i].y, old[i].z, old[i].w};
        uint32_t y[4];
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) y[j] = pack_bf16(low_bf16(x[j]) + before[i] * carry[2 * j], high_bf16(x[j]) + before[i] * carry[2 * j + 1]);
        *snapshot(n + i) = make_uint4(y[0], y[1], y[2], y[3]);
      }
    }
    if (!Tiles::leaves && last == chunks) break;
    float const* end = p.ends + (int64_t(head) * ends + s) * Tiles::snapshot + element;
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) carry[i] = end[i] + decay * carry[i];
    decay = 1.f;
  }
  if constexpr (Tiles::leaves) {
    float* final = is_z ? p.final_z + in_z + element : p.final_s + in_s;
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) final[i] = carry[i] / count;
  }
}

}  // namespace vidrial
