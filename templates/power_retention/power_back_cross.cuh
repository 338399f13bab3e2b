// What the gates between two tokens in different chunks are worth: <L, S> + <M, Z> at each chunk's end, S and Z the state there, L and M its adjoint.
// One CTA a chunk of one head; of the last one only where the state behind it is asked for, in float as it was given out. Both snapshots have the multiplicity 2 in the pair tiles of I < J, of which one counts.
#pragma once
#include <vidrial/collective/reduce.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_back_cross(Args const& p) {
  constexpr int kThreads = Tiles::threads, kBlocks = Tiles::d / 8, kZ = Tiles::keeps_z ? Tiles::d * Tiles::d : 0, kTile = 64 * Tiles::e;
  __shared__ float sums[kThreads / 32];
  int const chunk = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
  if constexpr (Tiles::leaves) {
    if (chunk + 1 == p.chunks) {
      auto dot = [&](float const* x, float const* y, int size) {
        float sum = 0.f;
        for (int i = thread; i < size; i += kThreads) sum += x[int64_t(head) * size + i] * y[int64_t(head) * size + i];
        return sum;
      };
      float const sum = dot(p.final_s, p.d_final_s, Tiles::snapshot - kZ) + dot(p.final_z, p.d_final_z, kZ), all = reduce<kThreads>(sum, Add{}, sums);
      if (thread == 0) p.cross[int64_t(head) * p.chunks + chunk] = all;
      return;
    }
  }
  cutlass::bfloat16_t const* adjoint = p.adjoint + (int64_t(head) * p.chunks + chunk) * Tiles::snapshot;
  cutlass::bfloat16_t const* state = p.snapshots + (int64_t(head) * p.chunks + chunk + 1) * Tiles::snapshot;
  // Of the elements [first, last), each thread its vectors'.
  auto dot = [&](int first, int last) {
    float sum = 0.f;
    for (int i = first + thread * 8; i < last; i += kThreads * 8) {
      uint4 const l = *reinterpret_cast<uint4 const*>(adjoint + i), s = *reinterpret_cast<uint4 const*>(state + i);
      uint32_t const x[4] = {l.x, l.y, l.z, l.w}, y[4] = {s.x, s.y, s.z, s.w};
      CUTE_UNROLL
      for (int w = 0; w < 4; ++w) sum += low_bf16(x[w]) * low_bf16(y[w]) + high_bf16(x[w]) * high_bf16(y[w]);
    }
    return sum;
  };
  float once = dot(0, kZ), twice = 0.f;
  int at = kZ;
  for (int i = 0; i < kBlocks; ++i) {
    int const next = at + (kBlocks - i) * kTile;
    once += dot(at, at + kTile);
    twice += dot(at + kTile, next);
    at = next;
  }
  float const all = reduce<kThreads>(once + 0.5f * twice, Add{}, sums);
  if (thread == 0) p.cross[int64_t(head) * p.chunks + chunk] = all;
}

}  // namespace vidrial
