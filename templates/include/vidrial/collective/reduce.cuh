// One value of many threads' values: by shuffles within a warp, through shared memory among warps. The order is fixed, so that results repeat.
#pragma once
#include <vidrial/arch/ptx.cuh>

namespace vidrial {

// The value of the lane whose number differs in these bits. T: any struct of 32-bit words.
template <class T>
CUTE_DEVICE T shuffle_xor(T const& x, int bits) {
  static_assert(sizeof(T) % 4 == 0, "values are exchanged in words of 4 bytes");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof(T));
  CUTE_UNROLL
  for (uint32_t& word : words) word = __shfl_xor_sync(~0u, word, bits);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

struct Add { template <class T> CUTE_DEVICE T operator()(T a, T b) const { return a + b; } };
struct Max { CUTE_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); } };

// join over `Lanes` neighbouring lanes, a power of two, in each of them. All lanes of the warp come here.
template <int Lanes = 32, class T, class Join>
CUTE_DEVICE T reduce_lanes(T x, Join join) {
  static_assert(Lanes >= 1 && Lanes <= 32 && (Lanes & (Lanes - 1)) == 0, "a power of two lanes, 32 at most");
  CUTE_UNROLL
  for (int bits = Lanes / 2; bits > 0; bits /= 2) x = join(x, shuffle_xor(x, bits));
  return x;
}

// join over `Threads` neighbouring threads, those of a row or of the whole CTA, in each of them: a power of two, or whole warps. All threads of
// the CTA come here. `scratch`: shared memory for one T of each of the CTA's warps; not touched where a row lies in a warp.
template <int Threads, class T, class Join>
CUTE_DEVICE T reduce(T x, Join join, T* scratch) {
  if constexpr (Threads <= 32) {
    return reduce_lanes<Threads>(x, join);
  } else {
    static_assert(Threads % 32 == 0, "more threads than a warp's are whole warps");
    constexpr int kWarps = Threads / 32;
    int const warp = threadIdx.x / 32, first = warp / kWarps * kWarps;
    x = reduce_lanes(x, join);
    __syncthreads();                                   // an earlier reduction has been read
    if (threadIdx.x % 32 == 0) scratch[warp] = x;
    __syncthreads();
    T all = scratch[first];
    CUTE_UNROLL
    for (int w = 1; w < kWarps; ++w) all = join(all, scratch[first + w]);
    return all;
  }
}

}  // namespace vidrial
