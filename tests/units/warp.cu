// Shuffles, votes and atomics of two warps, one row of 64 results each.
struct Args { int const* source; int* target; float* sum; };

extern "C" __global__ void __launch_bounds__(64) unit(__grid_constant__ Args const args) {
  int const thread = threadIdx.x, lane = thread & 31, x = args.source[thread];
  unsigned const all = 0xffffffffu, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int row = 0;
  auto const put = [&](int value) { args.target[64 * row++ + thread] = value; };
  put(__shfl_sync(all, x, 5));
  put(__shfl_sync(all, x, lane + 3, 8));
  put(__shfl_xor_sync(all, x, 17));
  put(__shfl_xor_sync(all, x, 3, 8));
  put(__shfl_down_sync(all, x, 2));
  put(__shfl_down_sync(all, x, 3, 16));
  put(__shfl_up_sync(all, x, 1));
  put(__shfl_up_sync(all, x, 5, 8));
  put(__shfl_xor_sync(half, x, 8));
  put(int(__ballot_sync(all, x & 1)));
  put(__any_sync(all, x == 7));
  put(__all_sync(all, x < 1000));
  put(__popc(unsigned(x)) + 100 * __clz(x) + 10000 * __ffs(x));
  put(int(__byte_perm(unsigned(x), 0x89abcdefu, 0x7152)));
  if (lane % 2) put(__shfl_xor_sync(0xaaaaaaaau, x, 2));
  else put(__shfl_xor_sync(0x55555555u, x, 4));
  __shared__ int counter[2];
  if (thread < 2) counter[thread] = 0;
  __syncthreads();
  atomicAdd(&counter[thread / 32], x);
  atomicMax(args.target + 64 * row, x);
  atomicAdd(args.sum, 0.5f * float(x));
  __syncthreads();
  if (lane == 0) args.target[64 * row + 1 + thread / 32] = counter[thread / 32];
}
