// What the scans of power retention share: the order of pair tiles, and how accumulators reach the snapshots' rows.
#pragma once
#include <vidrial/tile/mma.cuh>

namespace vidrial {

// Pair p of the lexicographic list of (I <= J) over n blocks.
CUTE_DEVICE int2 block_pair(int p, int n) {
  int i = 0;
  while (p >= n - i) { p -= n - i; ++i; }
  return make_int2(i, i + p);
}

// Of 32 columns of a row the threads t % 4 hold 2 t, 2 t + 1 of each of four atoms, a word each. A transposition of 4 x 4 among them gives
// thread t the 8 columns of atom t, which it stores at once.
CUTE_DEVICE uint4 gather_columns(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  // With the thread whose number differs in one bit: its half of what this one does not keep.
  auto exchange = [](bool upper, int bit, uint32_t& low, uint32_t& high) {
    uint32_t const got = __shfl_xor_sync(~0u, upper ? low : high, bit);
    low = upper ? got : low;
    high = upper ? high : got;
  };
  bool const first = threadIdx.x & 1, second = threadIdx.x & 2;
  exchange(first, 1, a, b);
  exchange(first, 1, c, d);
  exchange(second, 2, a, c);
  exchange(second, 2, b, d);
  return make_uint4(a, b, c, d);
}

}  // namespace vidrial
