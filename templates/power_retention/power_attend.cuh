// The output of power retention: y = (phi(q) S + causal power attention inside the chunk) / normaliser, in one kernel.
//
// A CTA owns `Tiles::rows` queries of one head. Through one ring of shared memory it streams the state before its chunk (Z, then the
// pair tiles of S) and then the keys and values of the chunk up to its own rows. phi(q) is made in registers; the scores' accumulator
// becomes the A operand of the second product without leaving them. The weights carry no scale: it meets them in the epilogue.
// The products are mma.sync or wgmma, by the tiled objects; wgmma runs on while the next factors and weights are made.
//
// Decay is exact and never overflows. With r = a just before the query tile, every factor is at most 1:
//   state                2^r 2^(a_i - r)
//   keys before the tile 2^(r - a_blockend) 2^(a_blockend - a_j) 2^(a_i - r)
//   keys in the tile     2^(a_i - a_j), after the mask
// so 2^r is applied before the first keys, the row factor 2^(a_i - r) before those in the tile; where there are no others, both at once.
#pragma once
#include "power_gates.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/tile/mma.cuh>

namespace vidrial {

constexpr float kLowestNormaliser = 1e-20f;

template <int Degree>
CUTE_DEVICE float power(float x) {
  static_assert(Degree == 2 || Degree == 4, "degrees 2 and 4 have kernels");
  float const square = x * x;
  return Degree == 2 ? square : square * square;
}

template <class Tiles, class Args>
CUTE_DEVICE void power_attend(Args const& p) {
  using Elem = typename Tiles::Elem;
  using Pair = vidrial::Pair<Elem>;
  using QK = typename Tiles::QK;
  using PV = typename Tiles::PV;
  using Smem = typename Tiles::Smem;
  constexpr int D = Tiles::d, kRows = Tiles::rows, kKeys = Tiles::keys, kStages = Tiles::stages, kDegree = Tiles::degree;
  constexpr int M = PV::M, kBlocks = D / 8;
  constexpr bool kGated = Tiles::gated, kNormalized = Tiles::normalized;
  // Stages that are being read: wgmma reads the one before while the next is waited for, so that one is refilled a step later.
  constexpr int kRead = PV::kAsync ? 2 : 1;
  // Groups of products that run on while the next one's factors are made: some 128 cycles of them.
  constexpr int kRunning = PV::N > 8 ? 1 : 2;
  VIDRIAL_SHARED_MEMORY(raw);

  int const thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  int const head = blockIdx.z, batch = head / p.h, kv_head = head - batch * p.h, q_head = kv_head * gridDim.y + blockIdx.y, chunks = p.chunks;
  int const m0 = blockIdx.x * kRows, chunk = m0 / p.chunk, c0 = chunk * p.chunk;
  int const first_diagonal_block = (m0 - c0) / kKeys, key_blocks = (min(m0 + kRows, p.t) - c0 + kKeys - 1) / kKeys;
  // NOTE: rows of the gates' tables fit an int, since the arrays have at most 2^31 elements; two pointers would be two registers more each.
  int const gates = head * chunks * p.chunk;
  auto a = [&](int token) { return p.a[gates + token]; };
  // What the gates have forgotten altogether by the first query, the state or the first blocks of keys, weighs 0: it is not read.
  float2 const r0 = kGated && m0 > c0 ? a(m0 - 1) : make_float2(0.f, 0.f);
  float const state_decay = kGated ? exp2_approx(r0.x + r0.y) : 1.f;
  bool const has_state = Tiles::stateful && chunk > 0 && state_decay > 0.f;
  int forgotten = 0;
  if (kGated) {
    for (unsigned zeros = ~0u; forgotten < first_diagonal_block && zeros == ~0u;) {
      int const j = forgotten + lane;
      zeros = __ballot_sync(~0u, j < first_diagonal_block && exp2_approx(diff_split(r0, a(c0 + (j + 1) * kKeys - 1))) == 0.f);
      forgotten += zeros == ~0u ? 32 : __ffs(~zeros) - 1;
    }
  }
  int const state_stages = has_state ? Tiles::z_stages + Tiles::s_stages : 0;

  uint32_t const smem = shared_address(raw), ring = smem + Smem::Ring, decay = smem + Smem::Decay;
  typename Tiles::CopyQ copy_q(p.q + batch * p.q_stride[0] + m0 * p.q_stride[1] + q_head * p.q_stride[2], p.q_stride[1], smem + Smem::Q, thread);
  typename Tiles::CopyK copy_k(p.k + batch * p.k_stride[0] + (c0 + forgotten * kKeys) * p.k_stride[1] + kv_head * p.k_stride[2], p.k_stride[1], ring, thread);
  typename Tiles::CopyV copy_v(p.v + batch * p.v_stride[0] + (c0 + forgotten * kKeys) * p.v_stride[1] + kv_head * p.v_stride[2], p.v_stride[1], ring + Tiles::K::kBytes, thread);
  cutlass::bfloat16_t const* snapshot = p.snapshots + (int64_t(head) * chunks + chunk) * Tiles::snapshot;
  typename Tiles::CopyZ copy_z(snapshot, D, ring, thread);
  typename Tiles::CopyS copy_s(snapshot + (kNormalized ? D * D : 0), Tiles::e, ring, thread);

  int fetched = 0, read = 0, write = kStages - kRead;
  // `state`: whether it may still be a part of the state; false costs neither instructions nor registers.
  auto fetch = [&](int stage, bool state) {
    uint32_t const at = stage * Tiles::stage_bytes;
    if (state && fetched < state_stages) {
      if (fetched < Tiles::z_stages) { copy_z.full(at); copy_z.source += Tiles::z_rows * D; }
      else { copy_s.full(at); copy_s.source += Tiles::s_tiles * 64 * Tiles::e; }
    } else if (int const j = forgotten + fetched - state_stages; j < key_blocks) {
      int const j0 = c0 + j * kKeys;
      copy_k(at, p.t - j0); copy_k.source += kKeys * p.k_stride[1];
      copy_v(at, p.t - j0); copy_v.source += kKeys * p.v_stride[1];
      if (kGated) {
        bool const diagonal = j >= first_diagonal_block;
        char const* source = diagonal ? reinterpret_cast<char const*>(p.a + gates + j0) : reinterpret_cast<char const*>(p.to_block + gates + j0);
        if (thread < (diagonal ? kKeys / 2 : kKeys / 4)) {
          cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(*reinterpret_cast<cute::uint128_t const*>(source + thread * 16),
                                                                shared_vector(decay + stage * (kKeys * 8) + thread * 16));
        }
      }
    }
    ++fetched;
    cute::cp_async_fence();
  };
  // The oldest stage has landed and the one before it, or before that, is free: refill that, hand out this.
  auto next = [&](bool state) {
    cute::cp_async_wait<kStages - 1 - kRead>();
    if (PV::kAsync) fence_async_proxy();
    __syncthreads();
    fetch(write, state);
    write = write + 1 == kStages ? 0 : write + 1;
    int const stage = read;
    read = read + 1 == kStages ? 0 : read + 1;
    return stage;
  };

  float o[M][PV::N][4] = {}, l[M][2] = {};

  copy_q(0, p.t - m0);
  CUTE_NO_UNROLL
  for (int s = 0; s < kStages - kRead; ++s) fetch(s, Tiles::stateful);

  typename QK::A load_q(smem + Smem::Q, thread);
  // The band of rows that is multiplied together, by a warp or a warpgroup, ends before `band_end`.
  int const row = m0 + PV::row(thread), band_end = m0 + (warp / Tiles::warps_per_band + 1) * Tiles::rows_per_band;

  if constexpr (Tiles::stateful) {
    PV::fence(o);
    if (has_state) {
      if constexpr (kNormalized) {                     // l = q^T Z q
        using QZ = typename Tiles::QZ;
        typename Tiles::RowsZ load_x(smem + Smem::Q, thread, 0, 0);
        CUTE_NO_UNROLL
        for (int s = 0; s < Tiles::z_stages; ++s) {
          int const stage = next(true);
          CUTE_NO_UNROLL
          for (int c = 0; c < D; c += QZ::N * 8) {     // some columns of these rows of Z
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
              for (int i = 0; i < M; ++i) { l[i][0] += i == m ? sum[0] : 0.f; l[i][1] += i == m ? sum[1] : 0.f; }
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
      using PS = typename Tiles::PS;
      typename PS::B load_s(ring, thread);
      typename Tiles::RowsI load_i(smem + Smem::Q, thread, 0, 0);
      typename Tiles::RowsJ load_j(smem + Smem::Q, thread, 0, 0);
      uint32_t qi[M][2][4];
      int i = 0, j = 0;
      CUTE_NO_UNROLL
      for (int s = 0; s < Tiles::s_stages; ++s) {
        int const stage = next(true);
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
            PS::template wait<kRunning>();           // the products before these have read their phi
            CUTE_UNROLL
            for (int m = 0; m < M; ++m) {
              CUTE_UNROLL
              for (int r = 0; r < 4; ++r) {
                uint32_t const x = qi[m][r % 2][k];
                phi[k][m][r] = multiply_bf16(r / 2 ? splat_high(x) : splat_low(x), qj[m][r % 2]);
              }
            }
            PS::mma_k(o, phi[k], load_s, stage * Tiles::stage_bytes, tile * 4 + k);
          }
          if (++j == kBlocks) j = ++i;
        }
      }
    }
    Tiles::PS::template wait<0>();
    PV::fence(o);
  }

  typename QK::B load_k(ring, thread);
  typename PV::B load_v(ring + Tiles::K::kBytes, thread);
  CUTE_NO_UNROLL
  for (int j = forgotten; j < key_blocks; ++j) {
    int const stage = next(false), j0 = c0 + j * kKeys;
    uint32_t const at = stage * Tiles::stage_bytes, gate = decay + stage * (kKeys * 8);
    bool const diagonal = j >= first_diagonal_block;
    if (kGated && (j == first_diagonal_block || (Tiles::stateful && j == forgotten))) {
      PV::fence(o);
      float const state = Tiles::stateful && j == forgotten ? state_decay : 1.f;
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) {
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          float const f = j == first_diagonal_block ? state * exp2_approx(diff_split(a(row + QK::row_of(m, 2 * h)), r0)) : state;
          l[m][h] *= f;
          CUTE_UNROLL
          for (int n = 0; n < PV::N; ++n) { o[m][n][2 * h] *= f; o[m][n][2 * h + 1] *= f; }
        }
      }
      PV::fence(o);
    }
    if (j0 >= band_end) continue;                          // the whole block lies above this band's diagonal
    // Scores become weights, in place.
    auto apply_weights = [&](int m, float (&s)[QK::N][4]) {
      if (!diagonal) {
        float const f = kGated ? exp2_approx(diff_split(r0, a(j0 + kKeys - 1))) : 1.f;
        CUTE_UNROLL
        for (int n = 0; n < QK::N; ++n) {
          float2 g = make_float2(1.f, 1.f);
          if (kGated) {
            g = load_shared_float2(gate + n * 32 + lane % 4 * 8);
            g.x *= f; g.y *= f;
          }
          CUTE_UNROLL
          for (int v = 0; v < 4; ++v) {
            float w = power<kDegree>(s[n][v]);
            if (kGated) w *= v % 2 ? g.y : g.x;
            s[n][v] = w;
            l[m][v / 2] += w;
          }
        }
      } else {
        // NOTE: read again, from L1, rather than kept in registers that the other blocks need.
        int const column = j0 + QK::column(thread);
        float2 ai[2] = {};
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) if (kGated) ai[h] = a(row + QK::row_of(m, 2 * h));
        CUTE_UNROLL
        for (int n = 0; n < QK::N; ++n) {
          float4 g = make_float4(0.f, 0.f, 0.f, 0.f);
          if (kGated) g = load_shared_float4(gate + n * 64 + lane % 4 * 16);
          CUTE_UNROLL
          for (int v = 0; v < 4; ++v) {
            float w = power<kDegree>(s[n][v]);
            if (kGated) w *= exp2_approx(diff_split(ai[v / 2], v % 2 ? make_float2(g.z, g.w) : make_float2(g.x, g.y)));
            // NOTE: select, do not multiply: above the diagonal the decay may be infinite.
            w = column + QK::column_of(n, v) <= row + QK::row_of(m, v) ? w : 0.f;
            s[n][v] = w;
            l[m][v / 2] += w;
          }
        }
      }
    };
    // Weights as the A operand of the second product, step k.
    auto pack = [&](float const (&s)[QK::N][4], int k, uint32_t (&fp)[4]) {
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) fp[r] = pack_bf16(s[2 * k + r / 2][2 * (r % 2)], s[2 * k + r / 2][2 * (r % 2) + 1]);
    };
    if constexpr (PV::kAsync) {
      // One buffer of scores: while those of 64 rows become weights, the product of the 64 before runs on.
      float s[QK::N][4] = {};
      uint32_t fp[M][kKeys / 16][4];
      QK::fence(s);
      QK::gemm(s, load_q, 0, 0, load_k, at);
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) {
        if (m == 0) QK::template wait<0>();
        else QK::template wait<1>();
        QK::fence(s);
        apply_weights(m, s);
        CUTE_UNROLL
        for (int k = 0; k < kKeys / 16; ++k) pack(s, k, fp[m][k]);
        if (m + 1 < M) {
          QK::gemm(s, load_q, m + 1, 0, load_k, at);
        }
        PV::gemm(o[m], fp[m], load_v, at);
      }
      // NOTE: nothing may run on into the next block: ptxas would serialise all products (C7513).
      PV::template wait<0>();
    } else {
      float s[M][QK::N][4] = {};
      CUTE_UNROLL
      for (int k = 0; k < D / 16; ++k) {
        uint32_t fq[M][4];
        load_q.load(0, k, fq);
        QK::mma_k(s, fq, load_k, at, k);
      }
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) apply_weights(m, s[m]);
      CUTE_UNROLL
      for (int k = 0; k < kKeys / 16; ++k) {
        uint32_t fp[M][4], fv[PV::N][2];
        CUTE_UNROLL
        for (int m = 0; m < M; ++m) pack(s[m], k, fp[m]);
        load_v.load(at, k, fv);
        CUTE_UNROLL
        for (int n = 0; n < PV::N; ++n) { fv[n][0] = Pair::to_bf16(fv[n][0]); fv[n][1] = Pair::to_bf16(fv[n][1]); }
        PV::multiply(o, fp, fv);
      }
    }
  }
  PV::fence(o);

  Elem* y = p.y + batch * p.y_stride[0] + int64_t(row) * p.y_stride[1] + q_head * p.y_stride[2] + PV::column(thread);
  CUTE_UNROLL
  for (int m = 0; m < M; ++m) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float norm = l[m][h];
      norm += __shfl_xor_sync(~0u, norm, 1);
      norm += __shfl_xor_sync(~0u, norm, 2);
      float const f = kNormalized ? p.weight_scale * reciprocal_approx(fmaxf(norm * p.weight_scale, kLowestNormaliser)) : p.weight_scale;
      int const r = PV::row_of(m, 2 * h);
      if (row + r < p.t) {
        CUTE_UNROLL
        for (int n = 0; n < PV::N; ++n) {
          *reinterpret_cast<uint32_t*>(y + r * p.y_stride[1] + PV::column_of(n, 0)) = Pair::pack(o[m][n][2 * h] * f, o[m][n][2 * h + 1] * f);
        }
      }
    }
  }
}

}  // namespace vidrial
