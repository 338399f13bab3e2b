// Flash attention forward on Hopper: one producer warp fetches by TMA, warpgroups of 64 rows each compute by wgmma.
//
// A CTA owns `Tiles::rows` rows of one head. Blocks of keys and values come from the last that a row sees to the first: of a causal mask
// the first block then gives the reference. Order `next`: the scores of the next block are issued before the product of this one, so that
// its weights are made while the tensor cores work; `serial`: one thing after the other, for larger tiles. Where warpgroups `turns` are
// "ping_pong" they issue in turn; else each leaves out the blocks that none of its rows sees ("skip").
//
// NOTE: what ptxas demands, or it serialises every wgmma: from a product's issue to the wait that covers it nothing may touch its
// accumulators or its A registers, on any path. So weights are packed, and the output rescaled, after the wait for the product before.
#pragma once
#include "keys.cuh"
#include "rows.cuh"
#include "softmax.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/pipeline/scheduler.cuh>
#include <vidrial/pipeline/tma_ring.cuh>
#include <vidrial/tile/tma.cuh>
#include <vidrial/tile/wgmma.cuh>

namespace vidrial {

// One tile of the work: `Tiles::rows` rows of one head, and the blocks of keys that they see.
template <class Tiles>
struct FlashTile {
  int batch, head, m0;
  VisibleKeys<Tiles> const visible;
  KeyBlocks<Tiles::keys> const all;
  template <class Args>
  CUTE_DEVICE FlashTile(Args const& p, TilePlace place)
      : batch(place.column / p.heads), head(place.column - batch * p.heads), m0(place.row * Tiles::rows), visible(p),
        all(visible, m0 / Tiles::pack, min((m0 + Tiles::rows - 1) / Tiles::pack, p.tq - 1)) {}
  CUTE_DEVICE int kv_head() const { return head / Tiles::heads_per_key; }
};

template <class Tiles, class Args>
CUTE_DEVICE void flash_produce(Args const& p, uint32_t smem, uint32_t bars) {
  using Bars = typename Tiles::Bars;
  using Smem = typename Tiles::Smem;
  typename Bars::k::Producer k(bars);
  typename Bars::v::Producer v(bars);
  typename Bars::order::Producer order(bars);
  uint32_t parity = 1;
  for (int tile = Bars::order::first(); tile < p.tiles; tile = order.next(tile, p.tiles, p.counter)) {
    FlashTile<Tiles> const at(p, Bars::order::place(tile, p.row_blocks, p.columns, p.column_groups));
    if (at.all.begin >= at.all.end) continue;
    auto load_k = [&](int j) {
      k.next([&](int stage, uint32_t full) {
        Tiles::BoxK::load(p.k, full, smem + Smem::K + stage * Tiles::BoxK::kBytes, kEvictLast, j * Tiles::keys, 0, at.kv_head(), at.batch);
      });
    };
    auto load_v = [&](int j) {
      v.next([&](int stage, uint32_t full) {
        Tiles::BoxV::load(p.v, full, smem + Smem::V + stage * Tiles::BoxV::kBytes, kEvictLast, j * Tiles::keys, 0, at.kv_head(), at.batch);
      });
    };
    Bars::q_empty::wait_free(bars, parity);
    parity ^= 1;
    if (threadIdx.x == 0) {
      Bars::q_full::expect(bars, Tiles::BoxQ::kBytes);
      Tiles::BoxQ::load(p.q, Bars::q_full::address(bars), smem + Smem::Q, kEvictFirst, at.m0, 0, at.head, at.batch);
    }
    load_k(at.all.end - 1);
    CUTE_NO_UNROLL
    for (int j = at.all.end - 2; j >= at.all.begin; --j) { load_k(j); load_v(j + 1); }
    load_v(at.all.begin);
  }
}

template <class Tiles, class Args>
CUTE_DEVICE void flash_consume(Args const& p, uint32_t smem, uint32_t bars, int group) {
  using QK = typename Tiles::QK;
  using PV = typename Tiles::PV;
  using Bars = typename Tiles::Bars;
  using Smem = typename Tiles::Smem;
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using Visible = VisibleKeys<Tiles>;
  constexpr int kKeys = Tiles::keys, kPack = Tiles::pack;
  constexpr bool kSkip = !Tiles::ping_pong;
  int const thread = Tiles::Roles::consumer_thread(), lane = threadIdx.x % 32;
  typename Bars::k::Consumer k(bars);
  typename Bars::v::Consumer v(bars);
  typename Bars::order::Consumer order(bars);
  typename QK::A load_q(smem + Smem::Q, thread);
  typename QK::B load_k(smem + Smem::K, thread);
  typename PV::B load_v(smem + Smem::V, thread);
  auto my_turn = [&] { if (!kSkip) Tiles::Turns::turn::sync(group); };
  auto next_turn = [&] { if (!kSkip) Tiles::Turns::turn::arrive(group + 1 == Tiles::groups ? 0 : group + 1); };
  if (!kSkip && group + 1 == Tiles::groups) Tiles::Turns::turn::arrive(0);
  uint32_t parity = 0;

  for (int tile = Bars::order::first(); tile < p.tiles; tile = order.next(tile, p.tiles)) {
    FlashTile<Tiles> const at(p, Bars::order::place(tile, p.row_blocks, p.columns, p.column_groups));
    int const row = at.m0 + QK::row(thread), column = QK::column(thread), first = at.m0 + group * 64;
    auto own = KeyBlocks<kKeys>(at.visible, first / kPack, min((first + 63) / kPack, p.tq - 1)).within(at.all);
    if (!kSkip) { own.begin = at.all.begin; own.end = at.all.end; }
    float o[PV::N][4], s[QK::N][4] = {};
    uint32_t w[kKeys / 16][4];                       // weights, as the A operand of the second product
    Softmax<QK::N> softmax(p.to_log2);
    CUTE_UNROLL
    for (int n = 0; n < PV::N; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.f;

    auto scores = [&](int stage) { QK::fence(s); QK::gemm(s, load_q, 0, 0, load_k, stage * Tiles::BoxK::kBytes); };
    auto product = [&](int stage) { PV::fence(o); PV::gemm(o, w, load_v, stage * Tiles::BoxV::kBytes); };
    auto pass_over = [&] { k.next(); k.release(); v.next(); v.release(); };
    auto weights = [&](int j, bool masked) {
      if constexpr (Tiles::capped) {
        CUTE_UNROLL
        for (int n = 0; n < QK::N; ++n) {
          CUTE_UNROLL
          for (int e = 0; e < 4; ++e) s[n][e] = tanh_fast(s[n][e] * p.to_cap);
        }
      }
      if (masked) {
        int const query[2] = {row / kPack, (row + 8) / kPack};
        mask<QK>(s, at.visible, query, j * kKeys + column);
      }
      softmax.weights(s);
    };
    auto pack = [&] {
      CUTE_UNROLL
      for (int i = 0; i < kKeys / 16; ++i) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) w[i][r] = Pair::pack(s[2 * i + r / 2][2 * (r % 2)], s[2 * i + r / 2][2 * (r % 2) + 1]);
      }
    };
    // Masked and unmasked blocks apart: the mask's code costs in a loop even where it is not executed.
    auto each_block = [&](int j, auto step) {
      CUTE_NO_UNROLL
      for (; j >= max(own.high, own.begin); --j) step(j, true);
      CUTE_NO_UNROLL
      for (; j >= max(own.low, own.begin); --j) step(j, false);
      if constexpr (Visible::kLeft) {
        CUTE_NO_UNROLL
        for (; j >= own.begin; --j) step(j, true);
      }
    };

    if (at.all.begin < at.all.end) { Bars::q_full::wait(bars, parity); parity ^= 1; }
    CUTE_NO_UNROLL
    for (int j = at.all.end; kSkip && j > own.end; --j) pass_over();
    if (own.begin < own.end) {
      if constexpr (Tiles::overlap) {
        scores(k.next());
        QK::template wait<0>(); QK::fence(s);
        k.release();
        weights(own.end - 1, own.end - 1 >= own.high || own.end - 1 < own.low);
        pack();
        each_block(own.end - 2, [&](int j, bool masked) {
          int const stage = k.next();
          my_turn();
          scores(stage);
          product(v.next());
          next_turn();
          QK::template wait<1>(); QK::fence(s);
          k.release();
          weights(j, masked);
          PV::template wait<0>(); PV::fence(o);
          v.release();
          pack();
          softmax.rescale(o);
        });
        product(v.next());
        PV::template wait<0>(); PV::fence(o);
        v.release();
      } else {
        each_block(own.end - 1, [&](int j, bool masked) {
          int const stage = k.next();
          my_turn();
          scores(stage);
          QK::template wait<0>(); QK::fence(s);
          next_turn();
          k.release();
          weights(j, masked);
          pack();
          softmax.rescale(o);
          product(v.next());
          PV::template wait<0>(); PV::fence(o);
          v.release();
        });
      }
    }
    CUTE_NO_UNROLL
    for (int j = own.begin; kSkip && j > at.all.begin; --j) pass_over();
    if (at.all.begin < at.all.end && lane == 0) Bars::q_empty::arrive(bars);

    softmax.finish();
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      int const r = row + 8 * h, query = r / kPack, q_head = at.head * kPack + r % kPack;
      bool const there = query < p.tq;
      if (there && lane % 4 == 0) p.lse[(int64_t(at.batch) * p.heads * kPack + q_head) * p.tq + query] = softmax.log_sum(h);
      auto* const y = p.y + at.batch * p.y_stride[0] + query * p.y_stride[1] + q_head * p.y_stride[2] + lane % 4 * 8;
      float const factor = softmax.factor(h);
      CUTE_UNROLL
      for (int n = 0; n < PV::N; n += 4) {
        uint4 const x = gather_quad<Pair>(reinterpret_cast<float const (&)[4][4]>(o[n]), h, factor, lane);
        if (there) *reinterpret_cast<uint4*>(y + n * 8) = x;
      }
    }
  }
}

template <class Tiles, class Args>
CUTE_DEVICE void flash_sm90(Args const& p) {
  using Roles = typename Tiles::Roles;
  VIDRIAL_SHARED_MEMORY(raw);
  uint32_t const smem = shared_address(raw), bars = smem + Tiles::Smem::Bars;
  int const warp = Roles::warp();
  if (threadIdx.x == 0) {
    Tiles::Bars::init(bars);
    barrier_init_fence();
    tma_prefetch(p.q); tma_prefetch(p.k); tma_prefetch(p.v);
  }
  __syncthreads();
  if (Roles::produces(warp)) {
    Roles::become_producer();
    if (warp == 0) flash_produce<Tiles>(p, smem, bars);
  } else {
    Roles::become_consumer();
    flash_consume<Tiles>(p, smem, bars, Roles::consumer_group(warp));
  }
}

}  // namespace vidrial
