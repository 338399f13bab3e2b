// What a tile of queries reads of the state: y += phi(q) S and, for the normaliser, l += q^T Z q. phi(q) is made in registers.
#pragma once
#include "power_tile.cuh"
#include <vidrial/collective/rows.cuh>
#include <vidrial/tile/fragment.cuh>

namespace vidrial {

// Z comes in `z_stages` stages, some rows in each. `next()` hands out the stages.
template <class Tiles, class QA, class Next, int M>
CUTE_DEVICE void query_normaliser(RowVector<M>& l, QA const& load_q, uint32_t q, uint32_t ring, int thread, Next&& next) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using QZ = typename Tiles::QZ;
  typename Tiles::RowsZ load_x(q, thread, 0, 0);
  CUTE_NO_UNROLL
  for (int s = 0; s < Tiles::z_stages; ++s) {
    int const stage = next();
    CUTE_NO_UNROLL
    for (int c = 0; c < Tiles::d; c += QZ::N * 8) {  // some columns of these rows of Z
      typename QZ::B load_z(ring, thread, 0, c);
      // q Z of 16 rows per warp, times q.
      auto add = [&](int m, float const (&z)[QZ::N][4]) {
        float sum[2] = {};
        CUTE_UNROLL
        for (int n = 0; n < QZ::N; n += 2) {
          uint32_t x[2][2];
          load_x(0, QZ::row_of(m, 0), c + n * 8, x[0][0], x[0][1], x[1][0], x[1][1]);
          CUTE_UNROLL
          for (int i = 0; i < 4; ++i) sum[i % 2] += z[n + i / 2][i % 2 * 2] * Pair::low(x[i / 2][i % 2]) + z[n + i / 2][i % 2 * 2 + 1] * Pair::high(x[i / 2][i % 2]);
        }
        CUTE_UNROLL
        for (int i = 0; i < M; ++i) { l.x[i][0] += i == m ? sum[0] : 0.f; l.x[i][1] += i == m ? sum[1] : 0.f; }
      };
      if constexpr (QZ::kAsync) {
        CUTE_NO_UNROLL
        for (int m = 0; m < M; ++m) {
          float z[QZ::N][4] = {};
          QZ::fence(z);
          QZ::gemm(z, load_q, m, s * QZ::K, load_z, stage * Tiles::stage_bytes);
          QZ::template wait<0>();
          QZ::fence(z);
          add(m, z);
        }
      } else {
        float z[M][QZ::N][4] = {};
        CUTE_NO_UNROLL
        for (int k = 0; k < QZ::K; ++k) {
          uint32_t fq[M][4];
          load_q.load(0, s * QZ::K + k, fq);
          CUTE_UNROLL
          for (int m = 0; m < M; ++m) {
            CUTE_UNROLL
            for (int r = 0; r < 4; ++r) fq[m][r] = Pair::to_bf16(fq[m][r]);
          }
          QZ::mma_k(z, fq, load_z, stage * Tiles::stage_bytes, k);
        }
        CUTE_UNROLL
        for (int m = 0; m < M; ++m) add(m, z[m]);
      }
    }
  }
}

// S comes in `s_stages` stages, some pair tiles (I, J) in each, lexicographic.
template <class Tiles, class Next>
CUTE_DEVICE void query_state(Fragment<typename Tiles::PV>& o, uint32_t q, uint32_t ring, int thread, Next&& next) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using PS = typename Tiles::PS;
  constexpr int M = PS::M, kBlocks = Tiles::d / 8;
  // Groups of products that run on while the next one's factors are made: some 128 cycles of them.
  constexpr int kRunning = PS::N > 8 ? 1 : 2;
  typename PS::B load_s(ring, thread);
  typename Tiles::RowsI load_i(q, thread, 0, 0);
  typename Tiles::RowsJ load_j(q, thread, 0, 0);
  uint32_t qi[M][2][4];
  int i = 0, j = 0;
  CUTE_NO_UNROLL
  for (int s = 0; s < Tiles::s_stages; ++s) {
    int const stage = next();
    CUTE_NO_UNROLL
    for (int tile = 0; tile < Tiles::s_tiles; ++tile) {
      if (i == j) {                                // a new block I: its features, as pairs, for every row
        CUTE_UNROLL
        for (int m = 0; m < M; ++m) {
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) {
            load_i(PS::row_of(m, 2 * h), i * 8, qi[m][h]);
            CUTE_UNROLL
            for (int x = 0; x < 4; ++x) qi[m][h][x] = Pair::to_bf16(qi[m][h][x]);
          }
        }
      }
      uint32_t qj[M][2];
      CUTE_UNROLL
      for (int m = 0; m < M; m += 2) load_j(0, PS::row_of(m, 0), j * 8, qj[m][0], qj[m][1], qj[m + 1][0], qj[m + 1][1]);
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) {
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) qj[m][h] = Pair::to_bf16(qj[m][h]);
      }
      uint32_t phi[4][M][4];
      CUTE_UNROLL
      for (int k = 0; k < 4; ++k) {
        PS::template wait<kRunning>();             // the products before these have read their phi
        CUTE_UNROLL
        for (int m = 0; m < M; ++m) {
          CUTE_UNROLL
          for (int r = 0; r < 4; ++r) {
            uint32_t const x = qi[m][r % 2][k];
            phi[k][m][r] = multiply_bf16(r / 2 ? splat_high(x) : splat_low(x), qj[m][r % 2]);
          }
        }
        PS::mma_k(o.x, phi[k], load_s, stage * Tiles::stage_bytes, tile * 4 + k);
      }
      if (++j == kBlocks) j = ++i;
    }
  }
}

}  // namespace vidrial
