// What a tile of tokens takes of a state: its rows x [D] of features and w [E],
//
//   dx = the two-sided contraction of w S^T with x  +  f Z x          of the state into dq (x = q, w = dy, f = -2 delta),
//   dw += phi(x) S                                                     of its adjoint into dk and dv (x = k, w = v, f = 2)
//
// Of a pair tile (I, J) the product w S^T is rows x 64 pairs: its atom a is feature a of block I, a thread's two columns in it are features
// 2 (lane % 4) + {0, 1} of block J. So dx_J += acc x_I stays in the thread, and dx_I += acc x_J is summed over four lanes once for each block I.
// dx lives in shared memory, a thread's own 8 bytes at a time: no bank conflicts, no barriers.
#pragma once
#include <vidrial/collective/gradient.cuh>
#include <vidrial/collective/rows.cuh>
#include <vidrial/tile/fragment.cuh>
#include <vidrial/tile/mma.cuh>

namespace vidrial {

// Parts of eight features, over the four lanes of a row, of which each keeps the two that it owns; the parts begin anew.
CUTE_DEVICE float2 sum_of_four(float (&x)[8], int thread) {
  bool const upper = thread & 2, odd = thread & 1;
  float y[4], d[2];
  CUTE_UNROLL
  for (int a = 0; a < 4; ++a) y[a] = (upper ? x[a + 4] : x[a]) + __shfl_xor_sync(~0u, upper ? x[a] : x[a + 4], 2);
  CUTE_UNROLL
  for (int a = 0; a < 2; ++a) d[a] = (odd ? y[a + 2] : y[a]) + __shfl_xor_sync(~0u, odd ? y[a] : y[a + 2], 1);
  CUTE_UNROLL
  for (int a = 0; a < 8; ++a) x[a] = 0.f;
  return make_float2(d[0], d[1]);
}

template <class Tiles>
struct StateGradient {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using WS = typename Tiles::WS;
  using DX = typename Tiles::DX;
  using DW = typename Tiles::DW;
  static constexpr int M = WS::M, kBlocks = Tiles::d / 8;
  using Ring = typename Tiles::Ring;
  uint32_t dx, ring;
  int thread;
  typename Tiles::XA::A load_x;
  typename Tiles::WB::A load_w;
  typename Tiles::RowsI load_i;
  typename Tiles::RowsJ load_j;

  CUTE_DEVICE StateGradient(uint32_t smem, uint32_t ring, int thread)
      : dx(smem + Tiles::Smem::Dx + thread * 8), ring(ring), thread(thread), load_x(smem + Tiles::Smem::X, thread), load_w(smem + Tiles::Smem::W, thread),
        load_i(smem + Tiles::Smem::X, thread), load_j(smem + Tiles::Smem::X, thread) {}

  // c = f dx, as accumulators, and its product with x, a row's part in each of the four threads; with values, phi(x) S into dw. `next` hands out
  // the stages of the ring: `z_stages`, then `s_stages`; factor(m, h): of Z x.
  template <class Next, class Factor>
  CUTE_DEVICE void operator()(Fragment<DX>& c, Fragment<DW>& dw, RowVector<M>& dot, Next&& next, Factor&& factor, float f) const {
    normaliser(next, factor);
    pairs(dw, next);
    read(c, dot, f);
  }

 private:
  // The thread's two features of block J of row h of m.
  CUTE_DEVICE uint32_t at(int j, int m, int h) const { return dx + ((j * M + m) * 2 + h) * (Tiles::threads * 8); }

  // dx = f(m, h) Z x, `z_stages` stages of the ring, some rows of Z in each; 0 where there is none.
  template <class Next, class Factor>
  CUTE_DEVICE void normaliser(Next&& next, Factor&& factor) const {
    using XZ = typename Tiles::XZ;
    typename XZ::B load_z(ring, thread);
    CUTE_NO_UNROLL
    for (int s = 0; s < Tiles::d / Tiles::z_rows; ++s) {
      float z[M][XZ::N][4] = {};
      if constexpr (Tiles::z_stages > 0) {
        int const stage = next();
        CUTE_UNROLL
        for (int k = 0; k < XZ::K; ++k) {
          uint32_t fx[M][4];
          load_x.load(0, k, fx);
          to_bf16(fx);
          XZ::mma_k(z, fx, load_z, stage * Tiles::stage_bytes, k);
        }
      }
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) {
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          float const f = factor(m, h);
          CUTE_UNROLL
          for (int n = 0; n < XZ::N; ++n) store_shared(at(s * XZ::N + n, m, h), make_float2(f * z[m][n][2 * h], f * z[m][n][2 * h + 1]));
        }
      }
    }
  }

  // Adds what S has, `s_stages` stages of the ring, `s_tiles` pair tiles (I, J) in each, lexicographic.
  template <class Next>
  CUTE_DEVICE void pairs(Fragment<DW>& dw, Next&& next) const {
    typename WS::B load_s(ring, thread);
    uint32_t fw[WS::K][M][4];
    CUTE_UNROLL
    for (int k = 0; k < WS::K; ++k) { load_w.load(0, k, fw[k]); to_bf16(fw[k]); }
    uint32_t xi[M][2][4];
    float part[M][2][8] = {};                          // of dx_I, over the thread's own columns
    int i = 0, j = 0;
    CUTE_NO_UNROLL
    for (int s = 0; s < Tiles::s_stages; ++s) {
      int const stage = next();
      CUTE_NO_UNROLL
      for (int tile = 0; tile < Tiles::s_tiles; ++tile) {
        uint32_t const place = stage * Tiles::stage_bytes + tile * Tiles::S::kBytes;
        if (i == j) {                                  // a new block I: its features, as pairs, for every row
          CUTE_UNROLL
          for (int m = 0; m < M; ++m) {
            CUTE_UNROLL
            for (int h = 0; h < 2; ++h) load_i(WS::row_of(m, 2 * h), i * 8, xi[m][h]);
          }
        }
        uint32_t xj[M][2];
        CUTE_UNROLL
        for (int m = 0; m < M; ++m) load_j(0, WS::row_of(m, 0), j * 8, xj[m][0], xj[m][1]);
        float acc[M][WS::N][4] = {};
        CUTE_UNROLL
        for (int k = 0; k < WS::K; ++k) WS::mma_k(acc, fw[k], load_s, place, k);
        CUTE_UNROLL
        for (int m = 0; m < M; ++m) {
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) contract(acc[m], h, xi[m][h], xj[m][h], at(j, m, h), part[m][h]);
        }
        if constexpr (Tiles::values) values(dw, xi, xj, place);
        if (++j == kBlocks) {
          CUTE_UNROLL
          for (int m = 0; m < M; ++m) {
            CUTE_UNROLL
            for (int h = 0; h < 2; ++h) add(at(i, m, h), sum_of_four(part[m][h], thread));
          }
          j = ++i;
        }
      }
    }
  }

  // dx as accumulators, times `f`; and its product with x, a row's part in each of the four threads, before anything is rounded.
  CUTE_DEVICE void read(Fragment<DX>& c, RowVector<M>& dot, float f) const {
    CUTE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) {
        uint32_t x[2];
        load_j(0, WS::row_of(m, 0), j * 8, x[0], x[1]);
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          float2 const d = load_shared_float2(at(j, m, h));
          c.x[m][j][2 * h] = f * d.x;
          c.x[m][j][2 * h + 1] = f * d.y;
          dot.x[m][h] += c.x[m][j][2 * h] * Pair::low(x[h]) + c.x[m][j][2 * h + 1] * Pair::high(x[h]);
        }
      }
    }
  }

  template <int N>
  CUTE_DEVICE static void to_bf16(uint32_t (&f)[N][4]) {
    CUTE_UNROLL
    for (int n = 0; n < N; ++n) {
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) f[n][r] = Pair::to_bf16(f[n][r]);
    }
  }
  CUTE_DEVICE static void add(uint32_t place, float2 x) {
    float2 const d = load_shared_float2(place);
    store_shared(place, make_float2(d.x + x.x, d.y + x.y));
  }
  // Row h of a pair tile: dx_J, in shared memory, and the thread's part of dx_I.
  CUTE_DEVICE static void contract(float const (&acc)[8][4], int h, uint32_t const (&xi)[4], uint32_t xj, uint32_t place, float (&part)[8]) {
    float const low = Pair::low(xj), high = Pair::high(xj);
    float2 d = make_float2(0.f, 0.f);
    CUTE_UNROLL
    for (int a = 0; a < 8; ++a) {
      float const x = a % 2 ? Pair::high(xi[a / 2]) : Pair::low(xi[a / 2]);
      d.x += acc[a][2 * h] * x;
      d.y += acc[a][2 * h + 1] * x;
      part[a] += acc[a][2 * h] * low;
      part[a] += acc[a][2 * h + 1] * high;
    }
    add(place, d);
  }
  // dw += phi(x) S of a pair tile, phi made in registers.
  CUTE_DEVICE void values(Fragment<DW>& dw, uint32_t const (&xi)[M][2][4], uint32_t const (&xj)[M][2], uint32_t place) const {
    using PS = typename Tiles::PS;
    typename PS::B load_s(ring, thread);
    CUTE_UNROLL
    for (int k = 0; k < PS::K; ++k) {
      uint32_t phi[M][4];
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) {
          uint32_t const x = Pair::to_bf16(xi[m][r % 2][k]);
          phi[m][r] = multiply_bf16(r / 2 ? splat_high(x) : splat_low(x), Pair::to_bf16(xj[m][r % 2]));
        }
      }
      mma_in_parts<PairTo<cutlass::bfloat16_t, cutlass::bfloat16_t>>(reinterpret_cast<Fragment<PS>&>(dw), phi, load_s, place, k);
    }
  }
};

}  // namespace vidrial
