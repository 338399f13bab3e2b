// The sum, then the largest and how often it occurs, of THREADS neighbouring threads each.
#include <vidrial/collective/reduce.cuh>

struct Args { float const* source; float* sum; float* largest; float* times; };
struct Largest { float value, times; };

extern "C" __global__ void __launch_bounds__(128) unit(__grid_constant__ Args const args) {
  __shared__ float sums[4];
  __shared__ Largest parts[4];
  int const thread = threadIdx.x;
  float const x = args.source[thread];
  args.sum[thread] = vidrial::reduce<THREADS>(x, vidrial::Add{}, sums);
  args.sum[128 + thread] = vidrial::reduce<THREADS>(2 * x, vidrial::Add{}, sums);
  Largest const all = vidrial::reduce<THREADS>(Largest{x, 1.f}, [](Largest a, Largest b) {
    return Largest{fmaxf(a.value, b.value), (a.value >= b.value ? a.times : 0.f) + (b.value >= a.value ? b.times : 0.f)};
  }, parts);
  args.largest[thread] = all.value;
  args.times[thread] = all.times;
}
