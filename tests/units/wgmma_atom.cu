// Our own wgmma atoms: C[64][N] = A[64][128] B[N][128]^T, A and B by TMA, B's rows along n or along k. With A in registers the thread loads it.
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/pipeline/tma_ring.cuh>
#include <vidrial/tile/tma.cuh>
#include <vidrial/tile/wgmma.cuh>

struct Args { vidrial::TensorMap a_map, b_map; T const* a; T const* b; float* c; };

extern "C" __global__ void __launch_bounds__(128) unit(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  uint32_t const smem = vidrial::shared_address(raw), barriers = smem + kBarriers;
  int const thread = threadIdx.x;
  if (thread == 0) {
    Bars::init(barriers);
    vidrial::barrier_init_fence();
    Bars::full::expect(barriers, BoxA::kBytes + BoxB::kBytes);
    BoxA::load(args.a_map, Bars::full::address(barriers), smem, vidrial::kEvictNormal, 0, 0);
    BoxB::load(args.b_map, Bars::full::address(barriers), smem + BoxA::kBytes, vidrial::kEvictNormal, 0, 0);
  }
  __syncthreads();
  Bars::full::wait(barriers, 0);
  float c[Mma::N][4] = {};
  typename Mma::B b(smem + BoxA::kBytes, thread);
#if SHARED_A
  typename Mma::A a(smem, thread);
  Mma::fence(c);
  Mma::gemm(c, a, 0, 0, b, 0);
#else
  uint32_t a[Mma::K][4];
  CUTE_UNROLL
  for (int k = 0; k < Mma::K; ++k) {
    CUTE_UNROLL
    for (int r = 0; r < 4; ++r) {
      int const row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8, column = k * 16 + thread % 4 * 2 + r / 2 * 8;
      a[k][r] = vidrial::opaque(*reinterpret_cast<int const*>(args.a + row * 128 + column));
    }
  }
  Mma::fence(c);
  Mma::gemm(c, a, b, 0);
#endif
  Mma::wait<0>();
  Mma::fence(c);
  CUTE_UNROLL
  for (int n = 0; n < Mma::N; ++n)
    CUTE_UNROLL
    for (int v = 0; v < 4; ++v) args.c[(Mma::row(thread) + Mma::row_of(0, v)) * (8 * Mma::N) + Mma::column(thread) + Mma::column_of(n, v)] = c[n][v];
}
