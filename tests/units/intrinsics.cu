// Each intrinsic of vidrial/arch/ptx.cuh on `count` pairs of floats (low, high), or on the bits of the pair packed as bf16 or fp16.
#include <vidrial/tile/mma.cuh>

struct Args { float const* low; float const* high; uint32_t* bits; float* floats; int count; };

extern "C" __global__ void __launch_bounds__(64) unit(__grid_constant__ Args const args) {
  using namespace vidrial;
  __shared__ uint32_t exchange[64];
  int const thread = threadIdx.x, n = args.count;
  for (int i = thread; i < n; i += 64) {
    float const low = args.low[i], high = args.high[i];
    uint32_t const b = pack_bf16(low, high), h = pack_fp16(low, high);
    args.bits[i] = b;
    args.bits[n + i] = h;
    args.bits[2 * n + i] = multiply_bf16(b, splat_low(b));
    args.bits[3 * n + i] = splat_high(b);
    args.floats[i] = low_fp16(h);
    args.floats[n + i] = high_fp16(h);
    args.floats[2 * n + i] = exp2_approx(low);
    args.floats[3 * n + i] = bits_as_float(b << 16);
    args.floats[4 * n + i] = reciprocal_approx(high + 0.5f);
  }
  uint32_t const base = shared_address(exchange);
  store_shared(base + 4 * thread, uint32_t(thread));
  __syncthreads();
  uint32_t r[4];
  load_shared(base + 16 * (thread % 16), r);
  args.bits[4 * n + thread] = r[0] + 100 * r[1] + 10000 * r[2] + 1000000 * r[3];
}
