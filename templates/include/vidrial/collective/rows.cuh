// Statistics of the rows of a fragment. A row's columns lie in the four threads of a quad: each keeps its own part until it is joined.
#pragma once
#include <vidrial/arch/ptx.cuh>

namespace vidrial {

// One number for each of the thread's rows: [m][h] goes with the accumulators [m][n][2 h] and [m][n][2 h + 1]. M: Mma::M.
template <int M>
struct RowVector {
  float x[M][2];

  CUTE_DEVICE void fill(float value) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) { x[m][0] = value; x[m][1] = value; }
  }
  // The quad's sum, or largest, in all four threads.
  CUTE_DEVICE void add_over_quad() { over_quad([](float a, float b) { return a + b; }); }
  CUTE_DEVICE void max_over_quad() { over_quad([](float a, float b) { return fmaxf(a, b); }); }

 private:
  template <class Join>
  CUTE_DEVICE void over_quad(Join join) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        x[m][h] = join(x[m][h], __shfl_xor_sync(~0u, x[m][h], 1));
        x[m][h] = join(x[m][h], __shfl_xor_sync(~0u, x[m][h], 2));
      }
    }
  }
};

}  // namespace vidrial
