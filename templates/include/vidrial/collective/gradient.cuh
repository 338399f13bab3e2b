// A block of the backward pass of attention, seen from tokens that stay: x and w are their rows, those of a and b come block by block.
//
//   s = x a^T, dp = w b^T;  the kernel's own mathematics makes of them, in place, weights (s) and gradients of scores (dp);
//   dx += dp a,  and where values are asked for,  dw += s b
//
// For queries that stay (x = q, w = dy, a = k, b = v) dx is dq; for keys (x = k, w = v, a = q, b = dy) it is dk, and dw is dv. The scores'
// accumulators become A operands of the second products in registers.
//
// Tiles (vidrial.layout.gradient.gradient_tiles) has XA, WB, DX, A, B, stage_bytes, and DW where `values` is true: a stage of the ring holds a
// block of a and, behind it, of b.
#pragma once
#include <vidrial/tile/fragment.cuh>

namespace vidrial {

// One step of k, A in registers, B in shared memory, converted: a few atoms at once, since all of them are many registers beside large accumulators.
template <class Convert, class Mma>
CUTE_DEVICE void mma_in_parts(Fragment<Mma>& c, uint32_t const (&a)[Mma::M][4], typename Mma::B const& operand, uint32_t stage, int k) {
  constexpr int kAtoms = 4;
  static_assert(Mma::N % kAtoms == 0, "columns come in parts of 32");
  CUTE_UNROLL
  for (int first = 0; first < Mma::N; first += kAtoms) {
    uint32_t f[kAtoms][2];
    operand.load(stage, k, f, first);
    CUTE_UNROLL
    for (int n = 0; n < kAtoms; ++n) { f[n][0] = Convert::of(f[n][0]); f[n][1] = Convert::of(f[n][1]); }
    Mma::multiply(c.x, a, f, first);
  }
}

template <class Tiles>
struct BlockGradient {
  using XA = typename Tiles::XA;
  using WB = typename Tiles::WB;
  using DX = typename Tiles::DX;
  using DW = typename Tiles::DW;
  using Weight = typename DX::B::T;
  using ToWeight = PairTo<typename Tiles::A::T, Weight>;
  static constexpr int M = DX::M;
  typename XA::A x;
  typename WB::A w;
  typename XA::B a;
  typename WB::B b;
  typename DX::B at;
  typename DW::B bt;

  // `x`, `w`, `ring`: addresses in shared memory.
  CUTE_DEVICE BlockGradient(uint32_t x, uint32_t w, uint32_t ring, int thread)
      : x(x, thread), w(w, thread), a(ring, thread), b(ring + Tiles::A::kBytes, thread), at(ring, thread), bt(ring + Tiles::A::kBytes, thread) {}

  // weights(m, s, dp): 16 rows of both become weights and gradients.
  template <class Weights>
  CUTE_DEVICE void operator()(Fragment<DX>& dx, Fragment<DW>& dw, int stage, Weights&& weights) const {
    uint32_t const place = stage * Tiles::stage_bytes;
    float s[M][XA::N][4] = {}, dp[M][XA::N][4] = {};
    XA::gemm(s, x, 0, a, place);
    WB::gemm(dp, w, 0, b, place);
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) weights(m, s[m], dp[m]);
    product<DX>(dx, dp, at, place);
    if constexpr (Tiles::values) product<DW>(dw, s, bt, place);
  }

 private:
  template <class Mma>
  CUTE_DEVICE static void product(Fragment<Mma>& c, float const (&s)[M][XA::N][4], typename Mma::B const& operand, uint32_t place) {
    CUTE_UNROLL
    for (int k = 0; k < Mma::K; ++k) {
      uint32_t fa[M][4];
      CUTE_UNROLL
      for (int m = 0; m < M; ++m) pack_operand<Weight>(s[m], k, fa[m]);
      mma_in_parts<ToWeight>(c, fa, operand, place, k);
    }
  }
};

}  // namespace vidrial
