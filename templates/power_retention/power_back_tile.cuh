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

// Rows that are multiplied together: a warp's, or by wgmma a warpgroup's; which of them are a thread's, and how many they are.
template <class Mma>
CUTE_DEVICE int band_of(int thread) { return Mma::kAsync ? __shfl_sync(~0u, thread / 128, 0) : thread / 32; }
template <class Mma>
CUTE_HOST_DEVICE constexpr int band_rows(int rows, int threads) { return rows / (threads / (Mma::kAsync ? 128 : 32)); }

// A snapshot on its way through the ring: `z_stages` times some rows of Z, then `s_stages` times some pair tiles of S.
template <class Tiles>
struct StateStream {
  cutlass::bfloat16_t const* snapshot;
  uint32_t ring;
  int thread;

  CUTE_DEVICE void operator()(int item, int stage) const {
    constexpr int kZSize = Tiles::keeps_z ? Tiles::d * Tiles::d : 0, kTile = 64 * Tiles::e;
    uint32_t const place = stage * Tiles::stage_bytes;
    // NOTE: copies are made anew: kept, their pointers would be registers that the state's loop has not.
    if (item < Tiles::z_stages) {
      typename Tiles::CopyZ(snapshot + item * (Tiles::z_rows * Tiles::d), Tiles::d, ring, thread).full(place);
    } else {
      typename Tiles::CopyS copy(snapshot + kZSize + (item - Tiles::z_stages) * (Tiles::s_tiles * kTile), Tiles::e, ring, thread);
      CUTE_NO_UNROLL
      for (int tile = 0; tile < Tiles::s_tiles; ++tile) {
        copy.full(place + tile * Tiles::S::kBytes);
        copy.source += kTile;
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
