// Rows of a fragment to global memory, from registers: two elements at once, in any layout whose columns are contiguous.
#pragma once
#include <vidrial/tile/fragment.cuh>

namespace vidrial {

// `target`: the element of this thread's first accumulator, 4-byte aligned as are the rows, `stride` elements apart; of the rows, `rows`
// exist from the thread's first one on. Each row is multiplied by factor(m, h).
template <class T, class Mma, class Factor>
CUTE_DEVICE void store_rows(Fragment<Mma> const& c, T* target, int64_t stride, int rows, Factor&& factor) {
  CUTE_UNROLL
  for (int m = 0; m < Mma::M; ++m) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      float const f = factor(m, h);
      int const row = Mma::row_of(m, 2 * h);
      if (row < rows) {
        CUTE_UNROLL
        for (int n = 0; n < Mma::N; ++n) {
          *reinterpret_cast<uint32_t*>(target + row * stride + Mma::column_of(n, 0)) = Pair<T>::pack(c.x[m][n][2 * h] * f, c.x[m][n][2 * h + 1] * f);
        }
      }
    }
  }
}

}  // namespace vidrial
