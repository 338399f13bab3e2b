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
#include "power_query.cuh"
#include "power_tile.cuh"
#include "power_weights.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/collective/attention.cuh>
#include <vidrial/collective/store.cuh>
#include <vidrial/pipeline/ring.cuh>
#include <vidrial/tile/mma.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_attend(Args const& p) {
  using Order = OrderOf<Tiles::overlapped>;
  using QK = typename Tiles::QK;
  using PV = typename Tiles::PV;
  using Smem = typename Tiles::Smem;
  VIDRIAL_SHARED_MEMORY(raw);
  QueryTile<Tiles, Args> const tile(p);
  int const thread = tile.thread;
  uint32_t const smem = shared_address(raw), q = smem + Smem::Q, stages = smem + Smem::Ring, decay = smem + Smem::Decay;

  typename Tiles::CopyQ const copy_q(tile.at_head(p.q, p.q_stride, tile.m0, blockIdx.z), p.q_stride[1], q, thread);
  PowerStream<Tiles, Args> stream(tile, stages, decay);
  typename Tiles::Ring ring;
  copy_q(0, tile.sequence.length() - tile.m0);
  ring.first([&](int item, int stage) { stream.template fetch<Tiles::stateful>(item, stage); });

  Fragment<PV> o = {};
  typename QK::A const load_q(q, thread);
  int const row = tile.m0 + PV::row(thread);
  PowerWeights<Tiles, Args> weights{tile, decay, row};
  if constexpr (Tiles::stateful) {
    auto next = [&] { return ring.next([&](int item, int stage) { stream.template fetch<true>(item, stage); }); };
    o.fence();
    if (tile.has_state) {
      if constexpr (Tiles::normalized) query_normaliser<Tiles>(weights.l, load_q, q, stages, thread, next);
      query_state<Tiles>(o, q, stages, thread, next);
    }
    Tiles::PS::template wait<0>();
    o.fence();
  }

  auto next = [&] { return ring.next([&](int item, int stage) { stream.template fetch<false>(item, stage); }); };
  Attention<Tiles, Order> const attention{load_q, typename QK::B(stages, thread), typename PV::B(stages + Tiles::K::kBytes, thread)};
  int const diagonal = tile.first_diagonal_block, last = tile.key_blocks, mine = unsigned(tile.band_end() - tile.c0 + Tiles::keys - 1) / Tiles::keys;
  if constexpr (Order::kOverlapped) {
    // Of a band's last blocks the upper half of its rows sees nothing.
    constexpr int kHalf = PV::M / 2, kLower = Tiles::halves ? kHalf * 64 / Tiles::keys : 0;
    int const whole = min(mine - kLower, last), seen = min(mine, last);
    Attention<Tiles, OrderOf<Tiles::halves>> const on_diagonal{load_q, attention.k, attention.v};
    attention(o, NoneMasked{}, next, weights, tile.forgotten, diagonal, diagonal);
    on_diagonal(o, AllMasked{}, next, weights, diagonal, whole, kLower ? whole : last);
    if constexpr (kLower > 0) on_diagonal.template operator()<kHalf>(o, AllMasked{}, next, weights, whole, seen, last);
  } else {
    attention(o, MaskedFrom{diagonal}, next, weights, tile.forgotten, mine, last);
  }
  o.fence();
  weights.l.add_over_quad();
  // NOTE: from the indices once more: what was known before the loops would be spilled across them, at d = 128.
  int const own = opaque(threadIdx.x), z = opaque(blockIdx.z), first = opaque(blockIdx.x) * Tiles::rows + PV::row(own);
  // What a backward pass asks for: norm [b hq, t].
  if (Tiles::normalized && p.norm && own % 4 == 0) weights.store_normaliser(p.norm + (int64_t(z) * gridDim.y + blockIdx.y) * p.t, first);
  store_rows(o, tile.at_head(p.y, p.y_stride, first, z) + PV::column(own), p.y_stride[1], tile.sequence.length() - first, [&](int m, int h) { return weights.finish(m, h); });
}

}  // namespace vidrial
