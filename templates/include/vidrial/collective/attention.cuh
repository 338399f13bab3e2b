// The loop over blocks of keys that attention is: scores = Q K^T of a block, weights of the scores, O += weights V. The scores' accumulator
// becomes the A operand of the second product in registers. What a weight is, is the kernel's own: a policy
//
//   struct Weights {
//     void enter(Fragment<PV>& o, int block);         // before a block of the serial order, or the first of the overlapped one; nothing runs
//     template <class Block>
//     void forward(int m, float (&s)[N][4], Block const& block);   // scores of 64 rows (wgmma) or 16 (mma.sync) become weights, in place
//     static constexpr bool kRescales;                // whether weights of a block change what O holds of the ones before:
//     void rescale(Fragment<PV>& o, int m);           // then this does it, after forward(m), before the product
//   };
//
// Tiles (vidrial.layout.attention.attention_tiles) has QK, PV, V and stage_bytes: a stage of the ring holds the keys and, behind them, the
// values of a block.
#pragma once
#include <vidrial/collective/mask.cuh>
#include <vidrial/tile/fragment.cuh>

namespace vidrial {

// Overlapped: the scores of a block are issued before the last product of the one before it, and nothing is waited for at a block's end, by
// wgmma; mma.sync, where nothing runs on, takes the serial order: a block's products are done before the next block begins.
template <bool Overlap> struct OrderOf { static constexpr bool kOverlapped = Overlap; };
using Serial = OrderOf<false>;
using Overlapped = OrderOf<true>;

// A block of keys: its number, the stage that holds it, and whether single keys of it are masked.
struct Block { int index, stage; bool masked; };
struct WholeBlock { int index, stage; static constexpr bool masked = false; };
struct MaskedBlock { int index, stage; static constexpr bool masked = true; };
CUTE_DEVICE WholeBlock block_of(NoneMasked, int index, int stage) { return {index, stage}; }
CUTE_DEVICE MaskedBlock block_of(AllMasked, int index, int stage) { return {index, stage}; }
CUTE_DEVICE Block block_of(MaskedFrom const& mask, int index, int stage) { return {index, stage, mask.masked(index)}; }

template <class Tiles, class Order>
struct Attention {
  using QK = typename Tiles::QK;
  using PV = typename Tiles::PV;
  using Weight = typename PV::B::T;
  // Values meet weights in the weights' type.
  using Value = PairTo<typename Tiles::V::T, Weight>;
  static constexpr int M = PV::M;
  typename QK::A const& q;
  typename QK::B k;
  typename PV::B v;

  // Blocks [from, to); those from `mine` on lie beyond this thread's rows and only pass through the ring: `next()` hands out its stages.
  // First: of the thread's M parts, those before it see nothing of these blocks, which follow others: nothing is entered.
  template <int First = 0, class Mask, class Next, class Weights>
  CUTE_DEVICE void operator()(Fragment<PV>& o, Mask mask, Next&& next, Weights& weights, int from, int mine, int to) const {
    // Of one part alone nothing runs beside the product that reads its weights, unless it is the softmax that O waits for.
    if constexpr (PV::kAsync && Order::kOverlapped && (M - First > 1 || Weights::kRescales)) overlapped<First>(o, mask, next, weights, from, mine, to);
    else serial<First>(o, mask, next, weights, from, mine, to);
  }

 private:
  template <int First, class Mask, class Next, class Weights>
  CUTE_DEVICE void serial(Fragment<PV>& o, Mask mask, Next& next, Weights& weights, int from, int mine, int to) const {
    CUTE_NO_UNROLL
    for (int j = from; j < to; ++j) {
      auto const block = block_of(mask, j, next());
      uint32_t const at = block.stage * Tiles::stage_bytes;
      if constexpr (First == 0) weights.enter(o, j);
      if (j >= mine) continue;
      if constexpr (PV::kAsync) {
        // One buffer of scores: while those of 64 rows become weights, the product of the 64 before runs on.
        float s[QK::N][4] = {};
        uint32_t fp[M][PV::K][4];
        QK::fence(s);
        QK::gemm(s, q, First, 0, k, at);
        CUTE_UNROLL
        for (int m = First; m < M; ++m) {
          if (m == First) QK::template wait<0>();
          else QK::template wait<1>();
          QK::fence(s);
          weights.forward(m, s, block);
          if constexpr (Weights::kRescales) rescale(o, weights, m);
          pack(s, fp[m]);
          if (m + 1 < M) QK::gemm(s, q, m + 1, 0, k, at);
          PV::gemm(o.x[m], fp[m], v, at);
        }
        // NOTE: nothing may run on into the next block: ptxas would serialise all products (C7513). The overlapped order can, because it packs
        // weights behind a wait for the product that reads them.
        PV::template wait<0>();
      } else {
        float s[M][QK::N][4] = {};
        CUTE_UNROLL
        for (int i = 0; i < QK::K; ++i) {
          uint32_t fq[M][4];
          q.load(0, i, fq);
          QK::mma_k(s, fq, k, at, i);
        }
        CUTE_UNROLL
        for (int m = 0; m < M; ++m) {
          weights.forward(m, s[m], block);
          if constexpr (Weights::kRescales) weights.rescale(o, m);
        }
        CUTE_UNROLL
        for (int i = 0; i < PV::K; ++i) {
          uint32_t fp[M][4], fv[PV::N][2];
          CUTE_UNROLL
          for (int m = 0; m < M; ++m) pack_operand<Weight>(s[m], i, fp[m]);
          v.load(at, i, fv);
          CUTE_UNROLL
          for (int n = 0; n < PV::N; ++n) { fv[n][0] = Value::of(fv[n][0]); fv[n][1] = Value::of(fv[n][1]); }
          PV::multiply(o.x, fp, fv);
        }
      }
    }
  }

  // NOTE: the waits are what ptxas asks for: from the issue of a wgmma to the wait that covers it, on no path, back edges and joins included,
  // may another instruction touch its accumulators or its A registers; it understands no condition, run-time flags least of all. Hence
  //   - masked blocks, and those that only pass by, have loops of their own, and the last product of a loop stands behind it;
  //   - a product may run on over the back edge, but the weights that it reads are packed again behind a wait for it only (C7513): the scores
  //     go first, so that wait<1> means the product before them; the other way round no count tells the two apart (C7514);
  //   - a wait on one side of a branch covers nothing behind the join (C7514, C7515), and a product inside a branch is no better;
  //   - all this takes registers: one set of scores and of weights for each part. A second set of scores, or 168 registers, and ptxas gives
  //     up on the pipeline (C7511, C7512).
  // The ring has to spare the stage before the one handed out (Ring's Read = 2).
  template <int First, class Mask, class Next, class Weights>
  CUTE_DEVICE void overlapped(Fragment<PV>& o, Mask mask, Next& next, Weights& weights, int from, int mine, int to) const {
    float s[QK::N][4] = {};
    uint32_t fp[M][PV::K][4];
    uint32_t before = 0;                                // the stage of the block before, whose last product is not issued yet
    // `has_previous(j)`: whether a block came before block j.
    auto one = [&](int j, auto has_previous) {
      auto const block = block_of(mask, j, next());
      uint32_t const at = block.stage * Tiles::stage_bytes;
      QK::fence(s);
      QK::gemm(s, q, First, 0, k, at);
      if (has_previous(j)) { PV::gemm(o.x[M - 1], fp[M - 1], v, before); QK::template wait<1>(); }
      else QK::template wait<0>();
      CUTE_UNROLL
      for (int m = First; m < M; ++m) {
        QK::fence(s);
        weights.forward(m, s, block);
        if constexpr (Weights::kRescales) rescale(o, weights, m);
        pack(s, fp[m]);
        if (m + 1 < M) {
          QK::gemm(s, q, m + 1, 0, k, at);
          PV::gemm(o.x[m], fp[m], v, at);
          QK::template wait<1>();
        }
      }
      before = at;
    };
    if (from < mine) {
      if constexpr (First == 0) weights.enter(o, from);
      o.fence();
      // NOTE: where O is rescaled, a wait that depends on the block is too much for ptxas (C7515): the first block has code of its own.
      if constexpr (Weights::kRescales) {
        one(from, [](int) { return false; });
        CUTE_NO_UNROLL
        for (int j = from + 1; j < mine; ++j) one(j, [](int) { return true; });
      } else {
        CUTE_NO_UNROLL
        for (int j = from; j < mine; ++j) one(j, [&](int j) { return j > from; });
      }
      PV::gemm(o.x[M - 1], fp[M - 1], v, before);
      PV::template wait<0>();
      o.fence();
    }
    CUTE_NO_UNROLL
    for (int j = from < mine ? mine : from; j < to; ++j) next();
  }

  // The products of these rows, and of the ones before them, are done.
  template <class Weights>
  CUTE_DEVICE static void rescale(Fragment<PV>& o, Weights& weights, int m) {
    PV::template wait<0>();
    o.fence();
    weights.rescale(o, m);
    o.fence();
  }
  CUTE_DEVICE static void pack(float const (&s)[QK::N][4], uint32_t (&fp)[PV::K][4]) {
    CUTE_UNROLL
    for (int i = 0; i < PV::K; ++i) pack_operand<Weight>(s, i, fp[i]);
  }
};

}  // namespace vidrial
