// dq of power retention: from the state before the chunk, contracted in registers, and from the chunk's keys up to the query's own.
//
//   dq_i = r_i (2^a_i (contraction of dy_i S^T with q_i - 2 delta_i Z q_i) + sum_j dz_ij k_j),   dz_ij = p s^(p-1) 2^(a_i - a_j) (dy_i . v_j - delta_i)
//
// with s = q_i . k_j. A CTA owns `Tiles::rows` queries of one head; through one ring of shared memory come the state (Z, then the pair tiles of S)
// and the chunk's keys and values. r_i meets the sum in the epilogue. Decays are those of power_attend.cuh, each at most 1. Beside dq goes its
// product with q, of which the gates' gradient is made: of the unrounded dz.
#pragma once
#include "power_back_state.cuh"
#include "power_back_tile.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/collective/gradient.cuh>

namespace vidrial {

// State and Block: by which instruction (power_back_state.cuh and collective/gradient.cuh, or power_back_wgmma.cuh).
template <class Tiles, template <class> class State, template <class> class Block, class Args>
CUTE_DEVICE void power_back_query(Args const& p) {
  using XA = typename Tiles::XA;
  using DX = typename Tiles::DX;
  using Smem = typename Tiles::Smem;
  constexpr int kRows = Tiles::rows, kKeys = Tiles::block, kDegree = Tiles::degree, M = DX::M, kStateStages = Tiles::z_stages + Tiles::s_stages;
  constexpr bool kGated = Tiles::gated;
  VIDRIAL_SHARED_MEMORY(raw);
  int const thread = threadIdx.x, lane = thread % 32, head = blockIdx.z, batch = head / p.h, kv_head = head % p.h, q_head = kv_head * p.group + blockIdx.y;
  int const m0 = blockIdx.x * kRows, chunk = m0 / p.chunk, c0 = chunk * p.chunk, diagonal = (m0 - c0) / kKeys;
  int const blocks = (min(m0 + kRows, p.t) - c0 + kKeys - 1) / kKeys;
  // NOTE: rows of the tables fit an int, since the arrays have at most 2^31 elements.
  int const gates = head * p.padded, table = (batch * p.h * p.group + q_head) * p.padded;
  auto a = [&](int token) { return kGated ? p.a[gates + token] : make_float2(0.f, 0.f); };
  bool const has_state = Tiles::stateful && (Tiles::enters || chunk > 0);
  uint32_t const smem = shared_address(raw), ring_at = smem + Smem::Ring, decay = smem + Smem::Table;

  auto at_head = [&](auto* x, int64_t const (&stride)[3], int h, int first) { return x + batch * stride[0] + first * stride[1] + h * stride[2]; };
  typename Tiles::CopyX const copy_q(at_head(p.q, p.q_stride, q_head, m0), p.q_stride[1], smem + Smem::X, thread);
  typename Tiles::CopyW const copy_dy(at_head(p.dy, p.dy_stride, q_head, m0), p.dy_stride[1], smem + Smem::W, thread);
  typename Tiles::CopyA copy_k(at_head(p.k, p.k_stride, kv_head, c0), p.k_stride[1], ring_at, thread);
  typename Tiles::CopyB copy_v(at_head(p.v, p.v_stride, kv_head, c0), p.v_stride[1], ring_at + Tiles::A::kBytes, thread);
  StateStream<Tiles> const state{Tiles::stateful ? p.snapshots + (int64_t(head) * p.chunks + chunk) * Tiles::snapshot : nullptr, ring_at, thread};
  // The ring's work items: the state's, then blocks of keys and values with their gates.
  int const first_block = has_state ? kStateStages : 0;
  auto fetch_block = [&](int item, int stage) {
    int const j = item - first_block, j0 = c0 + j * kKeys;
    if (j >= blocks) return;
    copy_k(stage * Tiles::stage_bytes, p.t - j0); copy_k.source += kKeys * p.k_stride[1];
    copy_v(stage * Tiles::stage_bytes, p.t - j0); copy_v.source += kKeys * p.v_stride[1];
    if (kGated) {
      if (j < diagonal) copy_vectors(p.to_block + gates + j0, decay + stage * (kKeys * 8), thread, kKeys / 4);
      else copy_vectors(p.a + gates + j0, decay + stage * (kKeys * 8), thread, kKeys / 2);
    }
  };
  auto fetch = [&](int item, int stage) {
    if (item < first_block) state(item, stage);
    else fetch_block(item, stage);
  };
  typename State<Tiles>::Ring ring;
  copy_q(0, p.t - m0);
  copy_dy(0, p.t - m0);
  ring.first(fetch);
  // Behind the state only blocks are fetched: what the state's copies need is dead there.
  auto next = [&] { return ring.next(fetch_block); };

  int const row = m0 + DX::row(thread);
  RowVector<M> r, delta, dot = {};
  CUTE_UNROLL
  for (int m = 0; m < M; ++m) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float2 const x = p.rows[table + row + DX::row_of(m, 2 * h)];
      r.x[m][h] = x.x; delta.x[m][h] = x.y;
    }
  }
  // r0: the sum of the gates before the tile.
  float2 const r0 = m0 > c0 ? a(m0 - 1) : make_float2(0.f, 0.f);
  Fragment<DX> dq = {};
  Fragment<typename Tiles::DW> unused;
  Block<Tiles> const gradient(smem + Smem::X, smem + Smem::W, ring_at, thread);
  if constexpr (Tiles::stateful) {
    if (has_state) {
      State<Tiles> const from_state(smem, ring_at, thread);
      ring.wait_first();
      from_state(dq, unused, dot, [&] { return ring.next(fetch); }, [&](int m, int h) { return -2.f * delta.x[m][h]; }, kGated ? exp2_approx(r0.x + r0.y) : 1.f);
    }
  }
  // Keys before the tile.
  int const column = DX::column(thread);
  CUTE_NO_UNROLL
  for (int j = 0; j < diagonal; ++j) {
    int const stage = next();
    float const f = kGated ? exp2_approx(diff_split(r0, a(c0 + (j + 1) * kKeys - 1))) : 1.f;
    gradient(dq, unused, stage, [&](int m, float (&s)[XA::N][4], float (&dp)[XA::N][4]) {
      CUTE_UNROLL
      for (int n = 0; n < XA::N; ++n) {
        float2 g = make_float2(1.f, 1.f);
        if (kGated) g = load_shared_float2(decay + stage * (kKeys * 8) + n * 32 + lane % 4 * 8);
        CUTE_UNROLL
        for (int v = 0; v < 4; ++v) {
          float const dz = slope<kDegree>(s[n][v]) * (f * (v % 2 ? g.y : g.x)) * (dp[n][v] - delta.x[m][v / 2]);
          dot.x[m][v / 2] += s[n][v] * dz;
          dp[n][v] = dz;
        }
      }
    });
  }
  // From here on rows count by themselves.
  if (kGated) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float const f = exp2_approx(diff_split(a(row + DX::row_of(m, 2 * h)), r0));
        dot.x[m][h] *= f;
        dq.scale_row(m, h, f);
      }
    }
  }
  // And those in it, up to the diagonal; blocks beyond a band's rows only pass by.
  int const band_end = m0 + (band_of<XA>(thread) + 1) * band_rows<XA>(kRows, Tiles::threads);
  CUTE_NO_UNROLL
  for (int j = diagonal; j < blocks; ++j) {
    int const stage = next(), j0 = c0 + j * kKeys;
    if (j0 >= band_end) continue;
    gradient(dq, unused, stage, [&](int m, float (&s)[XA::N][4], float (&dp)[XA::N][4]) {
      float2 ai[2] = {};
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) if (kGated) ai[h] = a(row + DX::row_of(m, 2 * h));
      CUTE_UNROLL
      for (int n = 0; n < XA::N; ++n) {
        float4 g = make_float4(0.f, 0.f, 0.f, 0.f);
        if (kGated) g = load_shared_float4(decay + stage * (kKeys * 8) + n * 64 + lane % 4 * 16);
        CUTE_UNROLL
        for (int v = 0; v < 4; ++v) {
          float dz = slope<kDegree>(s[n][v]) * (dp[n][v] - delta.x[m][v / 2]);
          if (kGated) dz *= exp2_approx(diff_split(ai[v / 2], v % 2 ? make_float2(g.z, g.w) : make_float2(g.x, g.y)));
          // NOTE: select, do not multiply: above the diagonal the decay may be infinite.
          dz = Causal{}.allows(row + DX::row_of(m, v), j0 + column + XA::column_of(n, v)) ? dz : 0.f;
          dot.x[m][v / 2] += s[n][v] * dz;
          dp[n][v] = dz;
        }
      }
    });
  }
  dot.add_over_quad();
  store_rows(dq, at_head(p.dq, p.dq_stride, q_head, row) + column, p.dq_stride[1], p.t - row, [&](int m, int h) { return r.x[m][h]; });
  store_column<DX>(p.dot_q + table, row, p.t, dot, [&](int m, int h) { return r.x[m][h]; });
}

}  // namespace vidrial
