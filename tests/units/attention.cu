// Softmax attention of one head by one CTA, on the loop over blocks of keys that power retention uses, too: rows, keys, masks and order as the
// case says. What is softmax's own is SoftmaxWeights.
#include <vidrial/collective/attention.cuh>
#include <vidrial/collective/rows.cuh>
#include <vidrial/collective/store.cuh>
#include <vidrial/pipeline/ring.cuh>
#include <vidrial/tile/mma.cuh>
using namespace vidrial;
using Elem = Tiles::Elem;

struct Args { Elem const* q; Elem const* k; Elem const* v; Elem* y; int rows, keys; };

template <class Tiles, class Rule>
struct SoftmaxWeights {
  using QK = typename Tiles::QK;
  using PV = typename Tiles::PV;
  static constexpr bool kRescales = true;
  Rule rule;
  float scale;                                         // of the scores, times log2(e)
  int row, column;                                     // of the thread's first score of block 0
  RowVector<PV::M> largest, sum = {}, factor;

  CUTE_DEVICE SoftmaxWeights(Rule rule, float scale, int row, int column) : rule(rule), scale(scale), row(row), column(column) { largest.fill(-1e30f); }
  CUTE_DEVICE void enter(Fragment<PV>&, int) {}
  template <class Block>
  CUTE_DEVICE void forward(int m, float (&s)[QK::N][4], Block const& block) {
    RowVector<1> best;
    best.fill(-1e30f);
    CUTE_UNROLL
    for (int n = 0; n < QK::N; ++n) {
      CUTE_UNROLL
      for (int v = 0; v < 4; ++v) {
        s[n][v] *= scale;
        if (block.masked && !rule.allows(row + QK::row_of(m, v), block.index * Tiles::keys + column + QK::column_of(n, v))) s[n][v] = -1e30f;
        best.x[0][v / 2] = fmaxf(best.x[0][v / 2], s[n][v]);
      }
    }
    best.max_over_quad();
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float const now = fmaxf(largest.x[m][h], best.x[0][h]);
      factor.x[m][h] = exp2_approx(largest.x[m][h] - now);
      largest.x[m][h] = now;
      sum.x[m][h] *= factor.x[m][h];
    }
    CUTE_UNROLL
    for (int n = 0; n < QK::N; ++n) {
      CUTE_UNROLL
      for (int v = 0; v < 4; ++v) {
        s[n][v] = exp2_approx(s[n][v] - largest.x[m][v / 2]);
        sum.x[m][v / 2] += s[n][v];
      }
    }
  }
  CUTE_DEVICE void rescale(Fragment<PV>& o, int m) {
    o.scale_row(m, 0, factor.x[m][0]);
    o.scale_row(m, 1, factor.x[m][1]);
  }
};

extern "C" __global__ void __launch_bounds__(Tiles::threads, Tiles::min_blocks) unit(__grid_constant__ Args const args) {
  using QK = Tiles::QK;
  using PV = Tiles::PV;
  constexpr int kRows = Tiles::rows, kKeys = Tiles::keys;
  VIDRIAL_SHARED_MEMORY(raw);
  int const thread = threadIdx.x, row = PV::row(thread);
  uint32_t const smem = shared_address(raw), stages = smem + Tiles::Smem::Ring;
  auto const rule = RULE;
  // Of the CTA's rows, and of those of the warps that multiply together.
  int const warp = __shfl_sync(~0u, thread / 32, 0), band = warp / Tiles::warps_per_band * Tiles::rows_per_band;
  KeyBlocks<kKeys> const all(rule, 0, kRows - 1), mine(rule, band, band + Tiles::rows_per_band - 1);

  Tiles::CopyQ const copy_q(args.q, Tiles::d, smem + Tiles::Smem::Q, thread);
  Tiles::CopyK const copy_k(args.k, Tiles::d, stages, thread);
  Tiles::CopyV const copy_v(args.v, Tiles::e, stages + Tiles::K::kBytes, thread);
  auto const copy = [&](int item, int stage) {
    int const key = (all.from + item) * kKeys;
    if (all.from + item < all.to) {
      auto k = copy_k;
      auto v = copy_v;
      k.source += int64_t(key) * Tiles::d;
      v.source += int64_t(key) * Tiles::e;
      k(stage * Tiles::stage_bytes, args.keys - key);
      v(stage * Tiles::stage_bytes, args.keys - key);
    }
  };
  Ring<Tiles::stages, PV::kAsync ? 2 : 1> ring;
  copy_q(0, args.rows);
  ring.first(copy);
  auto const next = [&] { return ring.next(copy); };

  Fragment<PV> o = {};
  SoftmaxWeights<Tiles, decltype(rule)> weights(rule, 1.44269504f * 0.125f, row, QK::column(thread));
  QK::A const load_q(smem + Tiles::Smem::Q, thread);
  Attention<Tiles, ORDER> const attention{load_q, QK::B(stages, thread), PV::B(stages + Tiles::K::kBytes, thread)};
  // What some rows see only in part, what all see, and the rest: of blocks beyond this band's rows nothing.
  auto const first = [&](int to) { return min(mine.to, to); };
  attention(o, AllMasked{}, next, weights, all.from, first(all.whole_from), all.whole_from);
  attention(o, NoneMasked{}, next, weights, all.whole_from, first(all.whole_to), all.whole_to);
  attention(o, AllMasked{}, next, weights, all.whole_to, first(all.to), all.to);
  o.fence();
  weights.sum.add_over_quad();
  store_rows(o, args.y + row * Tiles::e + PV::column(thread), Tiles::e, args.rows - row, [&](int m, int h) { return reciprocal_approx(weights.sum.x[m][h]); });
}
