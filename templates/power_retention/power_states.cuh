// The state before the first token on its way into every chunk, and the one behind the last token: power_carry's place where there is either.
//
//   C_0 = S_initial,  C_{s+1} = end_s + decay(segment s) C_s,  snapshot_n += decay(segment start .. n) C_s,  S_final = C of all segments
//
// Snapshots have the multiplicity 2 in the pair tiles of I < J, what a caller gives and takes has not. Of Z the symmetric part counts.
#pragma once
#include "power_join.cuh"
#include "power_tokens.cuh"

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_states(Args const& p) {
  constexpr int D = Tiles::d, E = Tiles::e, kZ = D * D, kTile = 64 * E;
  int const element = (blockIdx.x * Tiles::threads + threadIdx.x) * kJoined, head = blockIdx.z, row = element / D, column = element % D;
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
  float carry[kJoined] = {};
  if constexpr (Tiles::enters) {
    CUTE_UNROLL
    for (int i = 0; i < kJoined; ++i) {
      carry[i] = is_z ? 0.5f * (p.initial_z[in_z + element + i] + p.initial_z[in_z + (column + i) * D + row]) : count * p.initial_s[in_s + i];
    }
  }
  float decay = Tiles::enters ? 1.f : 0.f;                // of the carry up to the chunk
  for (int first = 0, s = 0; first < chunks; first += per_segment, ++s) {
    int const last = min(first + per_segment, chunks);
    decay = add_carry(carry, decay, first, last, snapshot, decay_of);
    if (!Tiles::leaves && last == chunks) break;
    float const* end = p.ends + (int64_t(head) * ends + s) * Tiles::snapshot + element;
    CUTE_UNROLL
    for (int i = 0; i < kJoined; ++i) carry[i] = end[i] + decay * carry[i];
    decay = 1.f;
  }
  if constexpr (Tiles::leaves) {
    float* final = is_z ? p.final_z + in_z + element : p.final_s + in_s;
    CUTE_UNROLL
    for (int i = 0; i < kJoined; ++i) final[i] = carry[i] / count;
  }
}

}  // namespace vidrial
