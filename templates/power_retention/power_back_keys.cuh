// dk and dv of power retention: from the adjoint of the state behind the chunk, and from the chunk's queries from the key's own on, of all heads of
// the group.
//
//   dv_j = 2^(a_end - a_j) phi(k_j) L + sum_i w_ij dy_i                                              w_ij = s^p 2^(a_i - a_j) r_i
//   dk_j = 2^(a_end - a_j) (contraction of v_j L^T with k_j + 2 M k_j) + sum_i dz_ij q_i               dz_ij = p s^(p-1) 2^(a_i - a_j) r_i (dy_i . v_j - delta_i)
//
// with s = q_i . k_j, a_end the sum of the gates at the chunk's end. A CTA owns `Tiles::rows` keys of one head; through one ring of shared memory
// come the adjoint (M, then the pair tiles of L), the queries behind the tile, and those in it.
//
// Decay is exact and never overflows. With e = a at the tile's end, every factor is at most 1:
//   adjoint                 2^(a_end - e) 2^(e - a_j)
//   queries behind the tile 2^(a_i - a_before) 2^(a_before - e) 2^(e - a_j)      `before`: the token before the block of queries; the first in a table, r_i in it
//   queries in the tile     2^(a_i - a_j), after the mask
// so the row factor 2^(e - a_j) meets the sum before the queries in the tile.
#pragma once
#include "power_back_state.cuh"
#include "power_back_tile.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/collective/gradient.cuh>

namespace vidrial {

// State and Block: by which instruction (power_back_state.cuh and collective/gradient.cuh, or power_back_wgmma.cuh).
template <class Tiles, template <class> class State, template <class> class Block, class Args>
CUTE_DEVICE void power_back_keys(Args const& p) {
  using XA = typename Tiles::XA;
  using DX = typename Tiles::DX;
  using DW = typename Tiles::DW;
  using Smem = typename Tiles::Smem;
  constexpr int kRows = Tiles::rows, kQueries = Tiles::block, kDegree = Tiles::degree, M = DX::M, kStateStages = Tiles::z_stages + Tiles::s_stages;
  constexpr bool kGated = Tiles::gated;
  VIDRIAL_SHARED_MEMORY(raw);
  int const thread = threadIdx.x, lane = thread % 32, head = blockIdx.y, batch = head / p.h, kv_head = head % p.h;
  int const m0 = blockIdx.x * kRows, chunk = m0 / p.chunk, c0 = chunk * p.chunk, end = min(c0 + p.chunk, p.t);
  // NOTE: rows of the tables fit an int, since the arrays have at most 2^31 elements.
  int const gates = head * p.padded;
  auto a = [&](int token) { return kGated ? p.a[gates + token] : make_float2(0.f, 0.f); };
  // Blocks of queries of each head of the group: behind the tile, and in it.
  int const behind = max(0, end - m0 - kRows + kQueries - 1) / kQueries, inside = (min(m0 + kRows, end) - m0 + kQueries - 1) / kQueries;
  // NOTE: asked in the kernel, though with a state that leaves it is always so: code without the branch spills 24 bytes, at d = 128.
  bool const has_state = Tiles::stateful && chunk + 1 < p.chunks + (Tiles::leaves ? 1 : 0);
  uint32_t const smem = shared_address(raw), ring_at = smem + Smem::Ring, tables = smem + Smem::Table;

  auto at_head = [&](auto* x, int64_t const (&stride)[3], int h, int first) { return x + batch * stride[0] + first * stride[1] + h * stride[2]; };
  typename Tiles::CopyX const copy_k(at_head(p.k, p.k_stride, kv_head, m0), p.k_stride[1], smem + Smem::X, thread);
  typename Tiles::CopyW const copy_v(at_head(p.v, p.v_stride, kv_head, m0), p.v_stride[1], smem + Smem::W, thread);
  StateStream<Tiles> const state{Tiles::stateful ? p.adjoint + (int64_t(head) * p.chunks + chunk) * Tiles::snapshot : nullptr, ring_at, thread};
  // The ring's work items: the adjoint's, then blocks of queries behind the tile, head by head, then those in it, each with what its rows weigh.
  int const first_block = has_state ? kStateStages : 0;
  auto fetch_block = [&](int item, int stage) {
    int i = item - first_block, blocks = behind, t0 = m0 + kRows;
    bool const masked = i >= behind * p.group;
    if (masked) { i -= behind * p.group; blocks = inside; t0 = m0; }
    int const g = i / blocks;
    if (g >= p.group) return;
    t0 += (i - g * blocks) * kQueries;
    // NOTE: made anew for each block: kept, their pointers would be registers that the state's loop has not.
    int const q_head = kv_head * p.group + g;
    typename Tiles::CopyA const copy_q(at_head(p.q, p.q_stride, q_head, t0), p.q_stride[1], ring_at, thread);
    typename Tiles::CopyB const copy_dy(at_head(p.dy, p.dy_stride, q_head, t0), p.dy_stride[1], ring_at + Tiles::A::kBytes, thread);
    copy_q(stage * Tiles::stage_bytes, p.t - t0);
    copy_dy(stage * Tiles::stage_bytes, p.t - t0);
    uint32_t const table = tables + stage * (kQueries * 16);
    int const row = (head * p.group + g) * p.padded + t0;
    if (!masked) return copy_vectors(p.from_block + row, table, thread, kQueries / 2);
    copy_vectors(p.rows + row, table, thread, kQueries / 2);
    if (kGated) copy_vectors(p.a + gates + t0, table + kQueries * 8, thread, kQueries / 2);
  };
  auto fetch = [&](int item, int stage) {
    if (item < first_block) state(item, stage);
    else fetch_block(item, stage);
  };
  typename State<Tiles>::Ring ring;
  copy_k(0, p.t - m0);
  copy_v(0, p.t - m0);
  ring.first(fetch);
  // Behind the state only blocks are fetched: what the state's copies need is dead there.
  auto next = [&] { return ring.next(fetch_block); };

  int const row = m0 + DX::row(thread), column = DX::column(thread);
  float2 const e = a(m0 + kRows - 1);
  RowVector<M> dot = {};
  Fragment<DX> dk = {};
  Fragment<DW> dv = {};
  Block<Tiles> const gradient(smem + Smem::X, smem + Smem::W, ring_at, thread);
  if constexpr (Tiles::stateful) {
    if (has_state) {
      State<Tiles> const from_state(smem, ring_at, thread);
      float const f = kGated ? exp2_approx(diff_split(a(c0 + p.chunk - 1), e)) : 1.f;
      ring.wait_first();
      from_state(dk, dv, dot, [&] { return ring.next(fetch); }, [](int, int) { return 2.f; }, f);
      dv.scale(f);
    }
  }
  CUTE_NO_UNROLL
  for (int g = 0; g < p.group; ++g) {
    CUTE_NO_UNROLL
    for (int j = 0; j < behind; ++j) {
      int const stage = next();
      float const f = kGated ? exp2_approx(diff_split(a(m0 + kRows + j * kQueries - 1), e)) : 1.f;
      gradient(dk, dv, stage, [&](int m, float (&s)[XA::N][4], float (&dp)[XA::N][4]) {
        CUTE_UNROLL
        for (int n = 0; n < XA::N; ++n) {
          float4 const c = load_shared_float4(tables + stage * (kQueries * 16) + n * 64 + lane % 4 * 16);
          CUTE_UNROLL
          for (int v = 0; v < 4; ++v) {
            float const x = s[n][v], weight = f * (v % 2 ? c.z : c.x), shift = f * (v % 2 ? c.w : c.y);
            float const dz = slope<kDegree>(x) * (dp[n][v] * weight - shift);
            s[n][v] = power<kDegree>(x) * weight;
            dp[n][v] = dz;
            dot.x[m][v / 2] += x * dz;
          }
        }
      });
    }
  }
  // From here on rows count by themselves.
  if (kGated) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float const f = exp2_approx(diff_split(e, a(row + DX::row_of(m, 2 * h))));
        dot.x[m][h] *= f;
        dk.scale_row(m, h, f);
        dv.scale_row(m, h, f);
      }
    }
  }
  // Blocks before a band's rows only pass by.
  int const band = m0 + band_of<XA>(thread) * band_rows<XA>(kRows, Tiles::threads);
  CUTE_NO_UNROLL
  for (int g = 0; g < p.group; ++g) {
    CUTE_NO_UNROLL
    for (int j = 0; j < inside; ++j) {
      int const stage = next(), t0 = m0 + j * kQueries;
      if (t0 + kQueries <= band) continue;
      gradient(dk, dv, stage, [&](int m, float (&s)[XA::N][4], float (&dp)[XA::N][4]) {
        uint32_t const table = tables + stage * (kQueries * 16);
        float2 aj[2] = {};
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) if (kGated) aj[h] = a(row + DX::row_of(m, 2 * h));
        CUTE_UNROLL
        for (int n = 0; n < XA::N; ++n) {
          float4 const r = load_shared_float4(table + n * 64 + lane % 4 * 16);
          float4 ai = make_float4(0.f, 0.f, 0.f, 0.f);
          if (kGated) ai = load_shared_float4(table + kQueries * 8 + n * 64 + lane % 4 * 16);
          CUTE_UNROLL
          for (int v = 0; v < 4; ++v) {
            float const x = s[n][v], delta = v % 2 ? r.w : r.y;
            float weight = v % 2 ? r.z : r.x;
            if (kGated) weight *= exp2_approx(diff_split(v % 2 ? make_float2(ai.z, ai.w) : make_float2(ai.x, ai.y), aj[v / 2]));
            // NOTE: select, do not multiply: below the diagonal the decay may be infinite.
            bool const sees = Causal{}.allows(t0 + column + XA::column_of(n, v), row + DX::row_of(m, v));
            float const dz = sees ? slope<kDegree>(x) * weight * (dp[n][v] - delta) : 0.f;
            s[n][v] = sees ? power<kDegree>(x) * weight : 0.f;
            dp[n][v] = dz;
            dot.x[m][v / 2] += x * dz;
          }
        }
      });
    }
  }
  dot.add_over_quad();
  auto one = [](int, int) { return 1.f; };
  store_rows(dk, at_head(p.dk, p.dk_stride, kv_head, row) + column, p.dk_stride[1], p.t - row, one);
  store_rows(dv, at_head(p.dv, p.dv_stride, kv_head, row) + column, p.dv_stride[1], p.t - row, one);
  store_column<DX>(p.dot_k + gates, row, p.t, dot, one);
}

}  // namespace vidrial
