// What the launches of the scan share.
#pragma once

// The sum of x over the CTA's threads up to this one; `total`: over all of them. `shared` holds a float per warp.
template <int Threads>
CUTE_DEVICE float join_threads(float x, float* shared, float& total) {
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  CUTE_UNROLL
  for (int d = 1; d < 32; d *= 2) {
    float const below = __shfl_up_sync(0xffffffff, x, d);
    if (lane >= d) x += below;
  }
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  float before = total = 0;
  CUTE_UNROLL
  for (int w = 0; w < Threads / 32; ++w) {
    if (w == warp) before = total;
    total += shared[w];
  }
  // The next call writes `shared` again.
  __syncthreads();
  return before + x;
}
