// C[M][N] = A[M][K] B[N][K]^T in bf16, 64 x 64 x 64 tiles, two stages, four warps: the style of a rendered kernel.
#include <vidrial/tile/mma.cuh>
using namespace cute;
using bf16 = cutlass::bfloat16_t;

using Block = vidrial::SmemTile<bf16, ComposedLayout<Swizzle<3, 3, 3>, _0, Layout<Shape<_64, _64>, Stride<_64, _1>>>>;
using Load = vidrial::TiledCopy<SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>, Block,
                                Layout<Shape<_8, _16>, Stride<_0, _1>>, Layout<Shape<_8, _16>, Stride<_8, _0>>, 16, 4>;
using A = vidrial::Operand<SM75_U32x4_LDSM_N, Block, Layout<Shape<_16, _2, _2, _2>, Stride<_1, _0, _16, _0>>,
                           Layout<Shape<_16, _2, _2, _2>, Stride<_0, _8, _0, _0>>, 32, 0, 0, 16>;
using B = vidrial::Operand<SM75_U32x4_LDSM_N, Block, Layout<Shape<_8, _2, _2, _2, _2>, Stride<_1, _0, _16, _0, _8>>,
                           Layout<Shape<_8, _2, _2, _2, _2>, Stride<_0, _8, _0, _0, _0>>, 32, 0, 0, 16>;
using Mma = vidrial::TiledMma<SM80_16x8x16_F32BF16BF16F32_TN, 2, 4, 4, A, B, Layout<Shape<_4, _8, _2, _2>, Stride<_0, _1, _16, _0>>,
                              Layout<Shape<_4, _8, _2, _2>, Stride<_2, _0, _0, _8>>, 32, 16>;
constexpr int kStage = Block::kBytes;

struct Args { bf16 const* a; bf16 const* b; float* c; int m, n, k; };

extern "C" __global__ void __launch_bounds__(128) gemm(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  int const thread = threadIdx.x, m0 = blockIdx.x * 64, n0 = blockIdx.y * 64, tiles = args.k / 64;
  uint32_t const sA = vidrial::shared_address(raw), sB = sA + 2 * kStage;
  Load load_a(args.a + int64_t(m0) * args.k, args.k, sA, thread), load_b(args.b + int64_t(n0) * args.k, args.k, sB, thread);
  A const a(sA, thread);
  B const b(sB, thread);
  float c[2][4][4] = {};
  auto const fetch = [&](int tile) {
    if (tile < tiles) {
      load_a(tile % 2 * kStage, args.m - m0);
      load_b(tile % 2 * kStage, args.n - n0);
      load_a.source += 64;
      load_b.source += 64;
    }
    cp_async_fence();
  };
  fetch(0);
  CUTE_NO_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    cp_async_wait<1>();
    __syncthreads();
    CUTE_UNROLL
    for (int k = 0; k < 4; ++k) {
      uint32_t fa[2][4], fb[4][2];
      a.load(tile % 2 * kStage, k, fa);
      b.load(tile % 2 * kStage, k, fb);
      Mma::multiply(c, fa, fb);
    }
    __syncthreads();
  }
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      CUTE_UNROLL
      for (int v = 0; v < 4; ++v) {
        int const m = m0 + Mma::row(thread) + Mma::row_of(i, v), n = n0 + Mma::column(thread) + Mma::column_of(j, v);
        if (m < args.m && n < args.n) args.c[int64_t(m) * args.n + n] = c[i][j][v];
      }
    }
  }
}
