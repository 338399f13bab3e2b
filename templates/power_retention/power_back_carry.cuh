// Joins the segments of power_back_scan_wgmma: every snapshot of a later segment, which holds earlier chunks, gets what the ones before carry into
// it. As power_carry.cuh, with chunks from the last one down: step n is the chunk chunks - 1 - n.
#pragma once
#include "power_join.cuh"

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_back_carry(Args const& p) {
  int const element = (blockIdx.x * Tiles::threads + threadIdx.x) * kJoined, head = blockIdx.z, chunks = p.chunks;
  if (element >= Tiles::snapshot) return;
  auto decay_of = [&](int n) {
    if (!Tiles::gated) return 1.f;
    float2 const total = p.a[(int64_t(head) * chunks + chunks - n) * p.chunk - 1];
    return exp2_approx(total.x + total.y);
  };
  auto snapshot = [&](int n) { return reinterpret_cast<uint4*>(p.adjoint + (int64_t(head) * chunks + chunks - 1 - n) * Tiles::snapshot + element); };
  auto end = [&](int s) { return reinterpret_cast<float4 const*>(p.ends + (int64_t(head) * (p.segments - 1) + s) * Tiles::snapshot + element); };
  join_segments(chunks, p.segments, end, snapshot, decay_of);
}

}  // namespace vidrial
