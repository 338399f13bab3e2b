// What power_back_state.cuh and collective/gradient.cuh say, by wgmma. A warp's accumulators are the same 16 rows by either instruction, so the
// kernels and their weights are one text; a warpgroup's products run on while its threads contract those of before.
#pragma once
#include "power_back_state.cuh"
#include <vidrial/pipeline/ring.cuh>
#include <vidrial/tile/wgmma.cuh>

namespace vidrial {

// A in registers for WarpgroupMma::gemm(c, a, m, k, b, stage), which is C = A B: accumulators need no zeros before.
template <int K>
struct HeldOperand {
  uint32_t const (&x)[K][4];
  CUTE_DEVICE uint32_t const (&operator()(uint32_t, int k, int) const)[4] { return x[k]; }
};
template <class Mma>
CUTE_DEVICE void gemm_held(float (&c)[Mma::N][4], uint32_t const (&a)[Mma::K][4], typename Mma::B const& b, uint32_t stage) {
  Mma::gemm(c, HeldOperand<Mma::K>{a}, 0, 0, b, stage);
}

// The ring as wgmma reads it.
template <class R> struct SeenByWgmma;
template <int Stages, int Read, int Ahead, bool Async>
struct SeenByWgmma<Ring<Stages, Read, Ahead, Async>> { using type = Ring<Stages, Read, Ahead, true>; };

// BlockGradient by wgmma: x, w, a and b are read where they lie. Nothing runs on when it returns.
template <class Tiles>
struct WarpgroupBlockGradient {
  using XA = typename Tiles::XA;
  using WB = typename Tiles::WB;
  using DX = typename Tiles::DX;
  using DW = typename Tiles::DW;
  static_assert(DX::M == 1, "a warpgroup has 64 rows");
  typename XA::A x;
  typename WB::A w;
  typename XA::B a;
  typename WB::B b;
  typename DX::B at;
  typename DW::B bt;

  CUTE_DEVICE WarpgroupBlockGradient(uint32_t x, uint32_t w, uint32_t ring, int thread)
      : x(x, thread), w(w, thread), a(ring, thread), b(ring + Tiles::A::kBytes, thread), at(ring, thread), bt(ring + Tiles::A::kBytes, thread) {}

  template <class Weights>
  CUTE_DEVICE void operator()(Fragment<DX>& dx, Fragment<DW>& dw, int stage, Weights&& weights) const {
    uint32_t const place = stage * Tiles::stage_bytes;
    float s[XA::N][4] = {}, dp[WB::N][4] = {};
    XA::fence(s);
    WB::fence(dp);
    XA::gemm(s, x, 0, 0, a, place);
    WB::gemm(dp, w, 0, 0, b, place);
    XA::template wait<0>();
    XA::fence(s);
    WB::fence(dp);
    weights(0, s, dp);
    uint32_t fz[DX::K][4], fw[DX::K][4];
    CUTE_UNROLL
    for (int k = 0; k < DX::K; ++k) {
      pack_operand<cutlass::bfloat16_t>(dp, k, fz[k]);
      if constexpr (Tiles::values) pack_operand<cutlass::bfloat16_t>(s, k, fw[k]);
    }
    dx.fence();
    DX::gemm(dx.x[0], fz, at, place);
    if constexpr (Tiles::values) {
      dw.fence();
      DW::gemm(dw.x[0], fw, bt, place);
    }
    DX::template wait<0>();
    dx.fence();
    if constexpr (Tiles::values) dw.fence();
  }
};

// StateGradient by wgmma. w stays in registers, as A operands. dx lives in shared memory as there, or, `Tiles::dx_kept`, in its accumulators:
// then all pair tiles are unrolled, and one is multiplied while the one before it is contracted.
template <class Tiles>
struct WarpgroupStateGradient {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using WS = typename Tiles::WS;
  using DX = typename Tiles::DX;
  using DW = typename Tiles::DW;
  using Ring = typename SeenByWgmma<typename Tiles::Ring>::type;
  static constexpr int M = 1, kBlocks = Tiles::d / 8, kTiles = Tiles::s_tiles, kAll = kBlocks * (kBlocks + 1) / 2;
  static constexpr bool kKept = Tiles::dx_kept;
  uint32_t x, w, dx, ring;
  int thread;
  typename Tiles::RowsI load_i;
  typename Tiles::RowsJ load_j;

  CUTE_DEVICE WarpgroupStateGradient(uint32_t smem, uint32_t ring, int thread)
      : x(smem + Tiles::Smem::X), w(smem + Tiles::Smem::W), dx(w + thread * 8), ring(ring), thread(thread), load_i(x, thread), load_j(x, thread) {
    if constexpr (!kKept && !Tiles::dx_over_w) dx = smem + Tiles::Smem::Dx + thread * 8;
  }

  // As StateGradient's. Nothing runs on when it returns.
  template <class Next, class Factor>
  CUTE_DEVICE void operator()(Fragment<DX>& c, Fragment<DW>& dw, RowVector<1>& dot, Next&& next, Factor&& factor, float f) const {
    normaliser(c, next, factor);
    uint32_t fw[WS::K][4];
    load_operand(typename Tiles::RowsW(w, thread), fw);
    if constexpr (kKept) {
      pairs_kept(c, fw, next);
    } else {
      if constexpr (Tiles::dx_over_w) __syncthreads();   // all have read w, over which dx will lie
      write(c);
      pairs(dw, fw, next);
    }
    read(c, dot, f);
    if constexpr (Tiles::dx_over_w) restore(fw);
  }

 private:
  // Rows of a tile as bf16 A operands.
  template <class Load, int K>
  CUTE_DEVICE static void load_operand(Load const& load, uint32_t (&a)[K][4]) {
    CUTE_UNROLL
    for (int k = 0; k < K; ++k) {
      load(0, 0, k * 16, a[k][0], a[k][1], a[k][2], a[k][3]);
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) a[k][r] = Pair::to_bf16(a[k][r]);
    }
  }
  // The thread's two features of block J of its row h.
  CUTE_DEVICE uint32_t at(int j, int h) const { return dx + (j * 2 + h) * (Tiles::threads * 8); }

  // c = f(0, h) Z x, some rows of Z a stage; 0 where there is none.
  template <class Next, class Factor>
  CUTE_DEVICE void normaliser(Fragment<DX>& c, Next&& next, Factor&& factor) const {
    if constexpr (Tiles::normalized) {
      using XZ = typename Tiles::XZ;
      typename XZ::B load_z(ring, thread);
      uint32_t fx[XZ::K][4];
      load_operand(typename Tiles::RowsX(x, thread), fx);
      CUTE_UNROLL
      for (int s = 0; s < Tiles::z_stages; ++s) {
        float z[XZ::N][4] = {};
        int const stage = next();
        XZ::fence(z);
        gemm_held<XZ>(z, fx, load_z, stage * Tiles::stage_bytes);
        XZ::template wait<0>();
        XZ::fence(z);
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          float const f = factor(0, h);
          CUTE_UNROLL
          for (int n = 0; n < XZ::N; ++n) {
            c.x[0][s * XZ::N + n][2 * h] = f * z[n][2 * h];
            c.x[0][s * XZ::N + n][2 * h + 1] = f * z[n][2 * h + 1];
          }
        }
      }
    }
  }

  CUTE_DEVICE void write(Fragment<DX> const& c) const {
    CUTE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) store_shared(at(j, h), make_float2(c.x[0][j][2 * h], c.x[0][j][2 * h + 1]));
    }
  }

  // Adds what S has: the pair tiles (I, J), lexicographic, `s_tiles` a stage. While one is contracted, phi times the same runs.
  template <class Next>
  CUTE_DEVICE void pairs(Fragment<DW>& dw, uint32_t const (&fw)[WS::K][4], Next&& next) const {
    typename WS::B load_s(ring, thread);
    float acc[WS::N][4] = {}, part[2][8] = {}, xi[2][8];
    uint32_t packed[2][4], phi[4][4];
    WS::fence(acc);
    dw.fence();
    int i = 0, j = 0;
    CUTE_NO_UNROLL
    for (int s = 0; s < Tiles::s_stages; ++s) {
      int const stage = next();
      CUTE_NO_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t const place = stage * Tiles::stage_bytes + tile * Tiles::S::kBytes;
        gemm_held<WS>(acc, fw, load_s, place);
        if (i == j) features(i, packed, xi);
        uint32_t xj[2];
        load_j(0, 0, j * 8, xj[0], xj[1]);
        if constexpr (Tiles::values) {
          using PS = typename Tiles::PS;
          typename PS::B load_t(ring, thread);
          WS::template wait<1>();                        // phi of the tile before has been read
          products(packed, xj, phi);
          PS::gemm(dw.x[0], phi, load_t, place);
          WS::template wait<1>();
        } else {
          WS::template wait<0>();
        }
        WS::fence(acc);
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          float2 d = load_shared_float2(at(j, h));
          contract(acc, h, xi[h], xj[h], d.x, d.y, part[h]);
          store_shared(at(j, h), d);
        }
        WS::fence(acc);
        if (++j == kBlocks) {
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) {
            float2 const d = load_shared_float2(at(i, h)), sum = sum_of_four(part[h], thread);
            store_shared(at(i, h), make_float2(d.x + sum.x, d.y + sum.y));
          }
          j = ++i;
        }
      }
      WS::template wait<0>();                            // the stage is refilled
    }
    dw.fence();
  }

  // The same, dx in `c`, all tiles unrolled.
  template <class Next>
  CUTE_DEVICE void pairs_kept(Fragment<DX>& c, uint32_t const (&fw)[WS::K][4], Next&& next) const {
    static_assert(!Tiles::values, "values have no registers beside two tiles and dx");
    typename WS::B load_s(ring, thread);
    float two[2][WS::N][4] = {}, part[2][8] = {}, xi[2][8];
    uint32_t packed[2][4];
    uint32_t place = next() * Tiles::stage_bytes;
    WS::fence(two[0]);
    gemm_held<WS>(two[0], fw, load_s, place);
    CUTE_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      features(i, packed, xi);
      CUTE_UNROLL
      for (int j = i; j < kBlocks; ++j) {
        int const after = i * kBlocks - i * (i - 1) / 2 + j - i + 1;
        uint32_t xj[2];
        load_j(0, 0, j * 8, xj[0], xj[1]);
        if (after < kAll) {
          if (after % kTiles == 0) place = next() * Tiles::stage_bytes;
          WS::fence(two[after % 2]);
          gemm_held<WS>(two[after % 2], fw, load_s, place + after % kTiles * Tiles::S::kBytes);
          WS::template wait<1>();
        } else {
          WS::template wait<0>();
        }
        float (&now)[WS::N][4] = two[(after - 1) % 2];
        WS::fence(now);
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          if (i == j) contract_diagonal(now, h, xi[h], c.x[0][j][2 * h], c.x[0][j][2 * h + 1]);
          else contract(now, h, xi[h], xj[h], c.x[0][j][2 * h], c.x[0][j][2 * h + 1], part[h]);
        }
        WS::fence(now);
      }
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float2 const sum = sum_of_four(part[h], thread);
        c.x[0][i][2 * h] += sum.x;
        c.x[0][i][2 * h + 1] += sum.y;
      }
    }
  }

  // dx as accumulators, times `f`; and its product with x, a row's part in each of the four threads, before anything is rounded.
  CUTE_DEVICE void read(Fragment<DX>& c, RowVector<1>& dot, float f) const {
    CUTE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      uint32_t features[2];
      load_j(0, 0, j * 8, features[0], features[1]);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float2 const d = kKept ? make_float2(c.x[0][j][2 * h], c.x[0][j][2 * h + 1]) : load_shared_float2(at(j, h));
        c.x[0][j][2 * h] = f * d.x;
        c.x[0][j][2 * h + 1] = f * d.y;
        dot.x[0][h] += c.x[0][j][2 * h] * Pair::low(features[h]) + c.x[0][j][2 * h + 1] * Pair::high(features[h]);
      }
    }
  }

  // w back to where dx lay; the next step of the ring makes it seen.
  CUTE_DEVICE void restore(uint32_t const (&fw)[WS::K][4]) const {
    __syncthreads();
    int const row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    CUTE_UNROLL
    for (int k = 0; k < WS::K; ++k) {
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) store_shared(w + Tiles::W::offset(row + r % 2 * 8, k * 16 + r / 2 * 8 + column), fw[k][r]);
    }
  }

  // Features of block I of both rows, as pairs and one by one.
  CUTE_DEVICE void features(int i, uint32_t (&packed)[2][4], float (&xi)[2][8]) const {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      load_i(8 * h, i * 8, packed[h]);
      CUTE_UNROLL
      for (int a = 0; a < 8; ++a) xi[h][a] = a % 2 ? Pair::high(packed[h][a / 2]) : Pair::low(packed[h][a / 2]);
    }
  }
  // phi(x) of a pair tile as an A operand.
  CUTE_DEVICE static void products(uint32_t const (&packed)[2][4], uint32_t const (&xj)[2], uint32_t (&phi)[4][4]) {
    CUTE_UNROLL
    for (int k = 0; k < 4; ++k) {
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        uint32_t const x = Pair::to_bf16(packed[r % 2][k]);
        phi[k][r] = multiply_bf16(r / 2 ? splat_high(x) : splat_low(x), Pair::to_bf16(xj[r % 2]));
      }
    }
  }
  // Row h of a pair tile: dx_J, and the thread's part of dx_I.
  CUTE_DEVICE static void contract(float const (&acc)[8][4], int h, float const (&xi)[8], uint32_t xj, float& d0, float& d1, float (&part)[8]) {
    float const low = Pair::low(xj), high = Pair::high(xj);
    CUTE_UNROLL
    for (int a = 0; a < 8; ++a) {
      d0 += acc[a][2 * h] * xi[a];
      d1 += acc[a][2 * h + 1] * xi[a];
      part[a] += acc[a][2 * h] * low;
      part[a] += acc[a][2 * h + 1] * high;
    }
  }
  // Of a tile (I, I), which is symmetric: one side, twice.
  CUTE_DEVICE static void contract_diagonal(float const (&acc)[8][4], int h, float const (&xi)[8], float& d0, float& d1) {
    float low = 0.f, high = 0.f;
    CUTE_UNROLL
    for (int a = 0; a < 8; ++a) {
      low += acc[a][2 * h] * xi[a];
      high += acc[a][2 * h + 1] * xi[a];
    }
    d0 += 2.f * low;
    d1 += 2.f * high;
  }
};

}  // namespace vidrial
