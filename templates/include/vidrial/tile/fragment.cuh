// A thread's accumulators of a tiled MMA (vidrial::TiledMma, vidrial::WarpgroupMma): [m][n][v] is row `Mma::row(thread) + Mma::row_of(m, v)`,
// column `Mma::column(thread) + Mma::column_of(n, v)`; v / 2 says which of two rows, v % 2 which of two neighbouring columns.
#pragma once
#include <vidrial/arch/ptx.cuh>

namespace vidrial {

// A pair of one element type as a pair of another: any as bf16, or the same.
template <class From, class To> struct PairTo;
template <class From>
struct PairTo<From, cutlass::bfloat16_t> {
  CUTE_DEVICE static uint32_t of(uint32_t x) { return Pair<From>::to_bf16(x); }
};
template <>
struct PairTo<cutlass::half_t, cutlass::half_t> {
  CUTE_DEVICE static uint32_t of(uint32_t x) { return x; }
};

// Accumulators of 16 neighbouring columns, those of step k, as the A operand of another product. T: its element type.
template <class T, int N>
CUTE_DEVICE void pack_operand(float const (&x)[N][4], int k, uint32_t (&a)[4]) {
  CUTE_UNROLL
  for (int r = 0; r < 4; ++r) a[r] = Pair<T>::pack(x[2 * k + r / 2][2 * (r % 2)], x[2 * k + r / 2][2 * (r % 2) + 1]);
}

template <class Mma>
struct Fragment {
  static constexpr int M = Mma::M, N = Mma::N;
  float x[M][N][4];

  // f(m, n, v, x) for every accumulator.
  template <class F>
  CUTE_DEVICE void each(F&& f) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) {
      CUTE_UNROLL
      for (int n = 0; n < N; ++n) {
        CUTE_UNROLL
        for (int v = 0; v < 4; ++v) f(m, n, v, x[m][n][v]);
      }
    }
  }
  CUTE_DEVICE void scale(float f) {
    each([&](int, int, int, float& x) { x *= f; });
  }
  // The row `h` of m, by its own factor.
  CUTE_DEVICE void scale_row(int m, int h, float f) {
    CUTE_UNROLL
    for (int n = 0; n < N; ++n) { x[m][n][2 * h] *= f; x[m][n][2 * h + 1] *= f; }
  }
  template <class T>
  CUTE_DEVICE void pack(int m, int k, uint32_t (&a)[4]) const { pack_operand<T>(x[m], k, a); }
  // What is written to the accumulators before this, or read after it, stays on its side: a product that runs on comes next, or was waited for.
  CUTE_DEVICE void fence() { Mma::fence(x); }
};

}  // namespace vidrial
