// What is done to the rows of a tile of scores or of results, in registers.
#pragma once
#include <vidrial/arch/ptx.cuh>

namespace vidrial {

// tanh(x), 2^-22 absolute: tanh.approx has 2^-11, which a cap of 50 would make an error of 2 % in a weight.
CUTE_DEVICE float tanh_fast(float x) { return 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(2.885390082f * x)); }

// Rows of 32 columns, as four accumulator blocks of a quad have them, become 16 bytes per lane: lane q gets block q.
template <class Pair>
CUTE_DEVICE uint4 gather_quad(float const (&o)[4][4], int h, float factor, int lane) {
  uint32_t x[4];
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = Pair::pack(o[i][2 * h] * factor, o[i][2 * h + 1] * factor);
  bool const odd = lane & 1, high = lane & 2;
  uint32_t const a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  uint32_t const y0 = odd ? a : x[0], y1 = odd ? x[1] : a, y2 = odd ? b : x[2], y3 = odd ? x[3] : b;
  uint32_t const c = __shfl_xor_sync(~0u, high ? y0 : y2, 2), d = __shfl_xor_sync(~0u, high ? y1 : y3, 2);
  return high ? make_uint4(c, d, y2, y3) : make_uint4(y0, y1, c, d);
}

// Scores of 16 rows, of which the thread has the queries `query[0]` and `query[1]`: those of keys that a query does not see, the block's
// first one being `key`, become -infinity.
template <class Mma, class Visible>
CUTE_DEVICE void mask(float (&s)[Mma::N][4], Visible const& visible, int const (&query)[2], int key) {
  CUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    int const end = visible.end(query[h]) - key, begin = visible.begin(query[h]) - key;
    CUTE_UNROLL
    for (int n = 0; n < Mma::N; ++n) {
      CUTE_UNROLL
      for (int e = 0; e < 2; ++e) {
        int const c = Mma::column_of(n, e);
        s[n][2 * h + e] = c < end && (!Visible::kLeft || c >= begin) ? s[n][2 * h + e] : bits_as_float(0xff800000u);
      }
    }
  }
}

}  // namespace vidrial
