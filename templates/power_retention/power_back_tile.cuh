// What the two kernels of the backward pass share that go over tiles of tokens.
#pragma once
#include "power_weights.cuh"
#include <vidrial/collective/store.cuh>
#include <vidrial/pipeline/ring.cuh>

namespace vidrial {

// The derivative of a score's power.
template <int Degree>
CUTE_DEVICE float slope(float s) {
  static_assert(Degree == 2 || Degree == 4, "degrees 2 and 4 have kernels");
  return Degree == 2 ? 2.f * s : 4.f * s * s * s;
}

// A snapshot on its way through the ring: `z_stages` times some rows of Z, then `s_stages` times some pair tiles of S.
template <class Tiles>
struct StateStream {
  typename Tiles::CopyZ copy_z;
  typename Tiles::CopyS copy_s;
  CUTE_DEVICE StateStream(cutlass::bfloat16_t const* snapshot, uint32_t ring, int thread)
      : copy_z(snapshot, Tiles::d, ring, thread), copy_s(snapshot + (Tiles::keeps_z ? Tiles::d * Tiles::d : 0), Tiles::e, ring, thread) {}

  CUTE_DEVICE void operator()(int item, int stage) {
    uint32_t const place = stage * Tiles::stage_bytes;
    if (item < Tiles::z_stages) {
      copy_z.full(place);
      copy_z.source += Tiles::z_rows * Tiles::d;
    } else {
      CUTE_NO_UNROLL
      for (int tile = 0; tile < Tiles::s_tiles; ++tile) {
        copy_s.full(place + tile * Tiles::S::kBytes);
        copy_s.source += 64 * Tiles::e;
      }
    }
  }
};

// A number for each row, summed over the quad before, times f(m, h): to `column[row]` on, of which `rows` exist in all.
template <class Mma, class Factor>
CUTE_DEVICE void store_column(float* column, int row, int rows, RowVector<Mma::M> const& x, Factor&& f) {
  if (threadIdx.x % 4 > 0) return;
  CUTE_UNROLL
  for (int m = 0; m < Mma::M; ++m) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      int const at = row + Mma::row_of(m, 2 * h);
      if (at < rows) column[at] = x.x[m][h] * f(m, h);
    }
  }
}

}  // namespace vidrial
