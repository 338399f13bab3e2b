// The weights of power attention: powers of the scores, times the decay between a key and its query. The policy of vidrial::Attention.
#pragma once
#include "power_tile.cuh"
#include <vidrial/collective/mask.cuh>
#include <vidrial/collective/rows.cuh>
#include <vidrial/tile/fragment.cuh>

namespace vidrial {

constexpr float kLowestNormaliser = 1e-20f;

template <int Degree>
CUTE_DEVICE float power(float x) {
  static_assert(Degree == 2 || Degree == 4, "degrees 2 and 4 have kernels");
  float const square = x * x;
  return Degree == 2 ? square : square * square;
}

template <class Tiles, class Args>
struct PowerWeights {
  using QK = typename Tiles::QK;
  using PV = typename Tiles::PV;
  static constexpr int kKeys = Tiles::keys, kDegree = Tiles::degree;
  static constexpr bool kGated = Tiles::gated, kRescales = false;
  QueryTile<Tiles, Args> const& tile;
  uint32_t decay;                      // of the keys, in each stage of the ring
  int row;                             // of the thread's first accumulator
  RowVector<PV::M> l = {};             // this thread's part of the sum of a row's weights

  // O and l begin to count from the next reference: the state's decay before the first keys, the rows' own before those in the tile.
  CUTE_DEVICE void enter(Fragment<PV>& o, int j) {
    if (kGated && (j == tile.first_diagonal_block || (Tiles::stateful && j == tile.forgotten))) {
      o.fence();
      float const state = Tiles::stateful && j == tile.forgotten ? tile.state_decay : 1.f;
      CUTE_UNROLL
      for (int m = 0; m < PV::M; ++m) {
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          float const f = j == tile.first_diagonal_block ? state * exp2_approx(diff_split(tile.a(row + QK::row_of(m, 2 * h)), tile.r0)) : state;
          l.x[m][h] *= f;
          o.scale_row(m, h, f);
        }
      }
      o.fence();
    }
  }

  template <class Block>
  CUTE_DEVICE void forward(int m, float (&s)[QK::N][4], Block const& block) {
    uint32_t const gate = decay + block.stage * (kKeys * 8);
    int const j0 = tile.c0 + block.index * kKeys;
    if (!block.masked) {
      float const f = kGated ? exp2_approx(diff_split(tile.r0, tile.a(j0 + kKeys - 1))) : 1.f;
      CUTE_UNROLL
      for (int n = 0; n < QK::N; ++n) {
        float2 g = make_float2(1.f, 1.f);
        if (kGated) {
          g = load_shared_float2(gate + n * 32 + tile.lane % 4 * 8);
          g.x *= f; g.y *= f;
        }
        CUTE_UNROLL
        for (int v = 0; v < 4; ++v) {
          float w = power<kDegree>(s[n][v]);
          if (kGated) w *= v % 2 ? g.y : g.x;
          s[n][v] = w;
          l.x[m][v / 2] += w;
        }
      }
    } else {
      // NOTE: read again, from L1, rather than kept in registers that the other blocks need.
      int const column = j0 + QK::column(tile.thread);
      float2 ai[2] = {};
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) if (kGated) ai[h] = tile.a(row + QK::row_of(m, 2 * h));
      CUTE_UNROLL
      for (int n = 0; n < QK::N; ++n) {
        float4 g = make_float4(0.f, 0.f, 0.f, 0.f);
        if (kGated) g = load_shared_float4(gate + n * 64 + tile.lane % 4 * 16);
        CUTE_UNROLL
        for (int v = 0; v < 4; ++v) {
          float w = power<kDegree>(s[n][v]);
          if (kGated) w *= exp2_approx(diff_split(ai[v / 2], v % 2 ? make_float2(g.z, g.w) : make_float2(g.x, g.y)));
          // NOTE: select, do not multiply: above the diagonal the decay may be infinite.
          w = Causal{}.allows(row + QK::row_of(m, v), column + QK::column_of(n, v)) ? w : 0.f;
          s[n][v] = w;
          l.x[m][v / 2] += w;
        }
      }
    }
  }

  // What a row of O is multiplied by; l has been summed over the quad.
  CUTE_DEVICE float finish(int m, int h) const {
    float const scale = tile.p.weight_scale;
    return Tiles::normalized ? scale * reciprocal_approx(fmaxf(l.x[m][h] * scale, kLowestNormaliser)) : scale;
  }
  // The normalisers of the rows from `first` on, to an array of all tokens.
  CUTE_DEVICE void store_normaliser(float* norm, int first) const {
    CUTE_UNROLL
    for (int m = 0; m < PV::M; ++m) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        int const i = first + PV::row_of(m, 2 * h);
        if (i < tile.sequence.length()) norm[i] = l.x[m][h] * tile.p.weight_scale;
      }
    }
  }
};

}  // namespace vidrial
