// Flash attention forward by cp.async and mma.sync, on every card.
//
// A CTA owns `Tiles::rows` rows of one key head: row r is query r / kPack of head r % kPack of the group. Blocks of keys and values come
// through a ring from the last that a row sees to the first: of a causal mask the first block then gives the reference of the softmax. The
// scores' accumulator becomes the A operand of the second product without leaving its registers. Where tiles are few, several CTAs share the
// blocks of one: each stores its part as float32, with its lse, and flash_combine.cuh joins them.
#pragma once
#include "keys.cuh"
#include "rows.cuh"
#include "softmax.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/pipeline/ring.cuh>
#include <vidrial/pipeline/scheduler.cuh>
#include <vidrial/tile/fragment.cuh>
#include <vidrial/tile/mma.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void flash_sm80(Args const& p) {
  using QK = typename Tiles::QK;
  using PV = typename Tiles::PV;
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  constexpr int kKeys = Tiles::keys, kPack = Tiles::pack, M = PV::M;
  VIDRIAL_SHARED_MEMORY(raw);
  uint32_t const smem = shared_address(raw), keys = smem + Tiles::Smem::K, values = smem + Tiles::Smem::V;
  int const thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);

  // The parts of a tile are neighbours; of a causal mask the last rows, which see most keys, come first.
  int const tile = Tiles::split ? blockIdx.x / p.splits : blockIdx.x, part = Tiles::split ? blockIdx.x - tile * p.splits : 0;
  TilePlace const place = tile_place<Tiles::causal>(tile, p.row_blocks, p.columns, p.column_groups);
  int const batch = place.column / p.h, head = place.column - batch * p.h, m0 = place.row * Tiles::rows;
  VisibleKeys<Tiles> const visible(p);
  auto blocks_of = [&](int first, int rows) { return KeyBlocks<kKeys>(visible, first / kPack, min((first + rows - 1) / kPack, p.tq - 1)); };
  KeyBlocks<kKeys> all = blocks_of(m0, Tiles::rows);
  if (Tiles::split) {
    int const share = (all.end - all.begin + p.splits - 1) / p.splits;
    all.begin = min(all.begin + part * share, all.end);
    all.end = min(all.begin + share, all.end);
  }
  // The warp's own rows see some of these blocks only.
  KeyBlocks<kKeys> const own = blocks_of(m0 + warp * 16 * M, 16 * M);

  typename Tiles::CopyQ copy_q(p.q + batch * p.q_stride[0] + int64_t(head) * kPack * p.q_stride[2], kPack == 1 ? p.q_stride[1] : 0, smem + Tiles::Smem::Q, thread);
  typename Tiles::CopyK copy_k(p.k + batch * p.k_stride[0] + int64_t(all.end - 1) * kKeys * p.k_stride[1] + head * p.k_stride[2], p.k_stride[1], keys, thread);
  typename Tiles::CopyV copy_v(p.v + batch * p.v_stride[0] + int64_t(all.end - 1) * kKeys * p.v_stride[1] + head * p.v_stride[2], p.v_stride[1], values, thread);
  // Work item i is block all.end - 1 - i.
  auto copy = [&](int item, int stage) {
    int const left = p.tk - (all.end - 1 - item) * kKeys;
    if (item >= all.end - all.begin) return;
    copy_k(stage * Tiles::K::kBytes, left); copy_k.source -= kKeys * p.k_stride[1];
    copy_v(stage * Tiles::V::kBytes, left); copy_v.source -= kKeys * p.v_stride[1];
  };
  Ring<Tiles::stages, 1> ring;
  if (all.begin < all.end) {
    if constexpr (kPack == 1) {
      copy_q.source += m0 * p.q_stride[1];
      copy_q(0, p.tq - m0);
    } else {
      copy_q.gather(0, p.tq * kPack - m0, [&](int r) { return (m0 + r) / kPack * p.q_stride[1] + (m0 + r) % kPack * p.q_stride[2]; });
    }
    ring.first(copy);
  }

  typename QK::A load_q(smem + Tiles::Smem::Q, thread);
  typename QK::B load_k(keys, thread);
  typename PV::B load_v(values, thread);
  int const row = m0 + QK::row(thread), column = QK::column(thread);
  float o[M][PV::N][4] = {};
  static_assert(M <= 2, "a warp has 16 or 32 rows");
  Softmax<QK::N> softmax[2] = {Softmax<QK::N>(p.to_log2), Softmax<QK::N>(p.to_log2)};

  // Queries of step k: kept in registers, or read again for every block.
  constexpr bool kKeep = Tiles::keep_queries;
  uint32_t queries[kKeep ? QK::K : 1][M][4];
  auto block = [&](int j, int stage, bool masked) {
    float s[M][QK::N][4] = {};
    CUTE_UNROLL
    for (int k = 0; k < QK::K; ++k) {
      uint32_t (&fq)[M][4] = queries[kKeep ? k : 0];
      if (!kKeep) load_q.load(0, k, fq);
      QK::mma_k(s, fq, load_k, stage * Tiles::K::kBytes, k);
    }
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) {
      if constexpr (Tiles::capped) {
        CUTE_UNROLL
        for (int n = 0; n < QK::N; ++n) {
          CUTE_UNROLL
          for (int e = 0; e < 4; ++e) s[m][n][e] = tanh_fast(s[m][n][e] * p.to_cap);
        }
      }
      if (masked) {
        int const query[2] = {(row + QK::row_of(m, 0)) / kPack, (row + QK::row_of(m, 2)) / kPack};
        mask<QK>(s[m], visible, query, j * kKeys + column);
      }
      softmax[m].weights(s[m]);
      softmax[m].rescale(o[m]);
    }
    // NOTE: all at once, which frees half of the scores' registers before the values' fragments want theirs.
    uint32_t w[PV::K][M][4];
    CUTE_UNROLL
    for (int k = 0; k < PV::K; ++k) {
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) pack_operand<typename Tiles::Elem>(s[m], k, w[k][m]);
    }
    CUTE_UNROLL
    for (int k = 0; k < PV::K; ++k) PV::mma_k(o, w[k], load_v, stage * Tiles::V::kBytes, k);
  };
  if (kKeep && all.begin < all.end) {
    ring.wait_first();                                 // queries came before the first stage
    CUTE_UNROLL
    for (int k = 0; k < QK::K; ++k) load_q.load(0, k, queries[k]);
  }
  int j = all.end - 1;
  auto masked_until = [&](int last) {
    CUTE_NO_UNROLL
    for (; j >= last; --j) {
      int const stage = ring.next(copy);
      if (j >= own.begin && j < own.end) block(j, stage, true);
    }
  };
  // Masked and unmasked blocks apart: the mask's code costs in a loop even where it is not executed.
  masked_until(max(all.high, all.begin));
  CUTE_NO_UNROLL
  for (; j >= max(all.low, all.begin); --j) block(j, ring.next(copy), false);
  if constexpr (decltype(visible)::kLeft) masked_until(all.begin);

  CUTE_UNROLL
  for (int m = 0; m < M; ++m) {
    softmax[m].finish();
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      int const r = row + QK::row_of(m, 2 * h), query = r / kPack, q_head = head * kPack + r % kPack;
      bool const there = query < p.tq;
      float const factor = softmax[m].factor(h);
      int64_t const place = (int64_t(part * p.columns + batch * p.h) * kPack + q_head) * p.tq + query;
      if (there && lane % 4 == 0) (Tiles::split ? p.part_lse : p.lse)[place] = softmax[m].log_sum(h);
      if constexpr (Tiles::split) {
        float* const y = p.parts + place * Tiles::e + PV::column(thread);
        CUTE_UNROLL
        for (int n = 0; n < PV::N; ++n) {
          if (there) *reinterpret_cast<float2*>(y + PV::column_of(n, 0)) = make_float2(o[m][n][2 * h] * factor, o[m][n][2 * h + 1] * factor);
        }
      } else {
        auto* const y = p.y + batch * p.y_stride[0] + query * p.y_stride[1] + q_head * p.y_stride[2] + lane % 4 * 8;
        CUTE_UNROLL
        for (int n = 0; n < PV::N; n += 4) {
          uint4 const x = gather_quad<Pair>(reinterpret_cast<float const (&)[4][4]>(o[m][n]), h, factor, lane);
          if (there) *reinterpret_cast<uint4*>(y + n * 8) = x;
        }
      }
    }
  }
}

}  // namespace vidrial
