// C = A B^T in bf16, written with CuTe's partitions: TiledMMA, TiledCopy, partition_*, copy, gemm. benchmarks/compile.py holds it
// beside resolved_style/gemm_sm80.cu.j2, which does the same work.
#include <cute/tensor.hpp>
#pragma nv_hdrstop
using namespace cute;
using Elem = cutlass::bfloat16_t;

struct alignas(8) Args { Elem const* a; Elem const* b; Elem* c; int m, n, k; };

constexpr int kStages = {{ stages }};
using TileMNK = Shape<Int<{{ m }}>, Int<{{ n }}>, Int<{{ k }}>>;
using Rows = decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_8, _64>, Stride<_64, _1>>{}));
using SmemA = decltype(tile_to_shape(Rows{}, Shape<Int<{{ m }}>, Int<{{ k }}>, Int<kStages>>{}));
using SmemB = decltype(tile_to_shape(Rows{}, Shape<Int<{{ n }}>, Int<{{ k }}>, Int<kStages>>{}));
using Mma = TiledMMA<MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>, Layout<Shape<_2, _2, _1>>, Tile<_32, _32, _16>>;
using Fetch = decltype(make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>, Elem>{}, Layout<Shape<_16, _8>, Stride<_8, _1>>{}, Layout<Shape<_1, _8>>{}));
using Load = Copy_Atom<SM75_U32x4_LDSM_N, Elem>;

extern "C" __global__ void __launch_bounds__(128) gemm(__grid_constant__ Args const args) {
  extern __shared__ __align__(1024) char raw[];
  int const thread = threadIdx.x;
  Tensor mA = make_tensor(make_gmem_ptr(args.a), make_shape(args.m, args.k), make_stride(args.k, _1{}));
  Tensor mB = make_tensor(make_gmem_ptr(args.b), make_shape(args.n, args.k), make_stride(args.k, _1{}));
  Tensor mC = make_tensor(make_gmem_ptr(args.c), make_shape(args.m, args.n), make_stride(args.n, _1{}));
  auto const cta = make_coord(blockIdx.x, blockIdx.y, _);
  Tensor gA = local_tile(mA, TileMNK{}, cta, Step<_1, X, _1>{});
  Tensor gB = local_tile(mB, TileMNK{}, cta, Step<X, _1, _1>{});
  Tensor gC = local_tile(mC, TileMNK{}, cta, Step<_1, _1, X>{});
  Elem* const shared = reinterpret_cast<Elem*>(raw);
  Tensor sA = make_tensor(make_smem_ptr(shared), SmemA{});
  Tensor sB = make_tensor(make_smem_ptr(shared + cosize_v<SmemA>), SmemB{});

  Fetch fetch;
  auto fetch_thread = fetch.get_slice(thread);
  Tensor tAgA = fetch_thread.partition_S(gA);
  Tensor tAsA = fetch_thread.partition_D(sA);
  Tensor tBgB = fetch_thread.partition_S(gB);
  Tensor tBsB = fetch_thread.partition_D(sB);
  Mma mma;
  auto mma_thread = mma.get_slice(thread);
  Tensor tCgC = mma_thread.partition_C(gC);
  Tensor rC = mma_thread.make_fragment_C(tCgC);
  Tensor rA = mma_thread.partition_fragment_A(sA(_, _, 0));
  Tensor rB = mma_thread.partition_fragment_B(sB(_, _, 0));
  auto load_a = make_tiled_copy_A(Load{}, mma);
  auto load_b = make_tiled_copy_B(Load{}, mma);
  auto load_a_thread = load_a.get_slice(thread);
  auto load_b_thread = load_b.get_slice(thread);
  Tensor tXsA = load_a_thread.partition_S(sA);
  Tensor tXrA = load_a_thread.retile_D(rA);
  Tensor tXsB = load_b_thread.partition_S(sB);
  Tensor tXrB = load_b_thread.retile_D(rB);
  clear(rC);

  int const tiles = size<3>(tAgA);
  int fetched = 0, read = 0, write = kStages - 1;
  auto next = [&](int stage) {
    if (fetched < tiles) {
      copy(fetch, tAgA(_, _, _, fetched), tAsA(_, _, _, stage));
      copy(fetch, tBgB(_, _, _, fetched), tBsB(_, _, _, stage));
    }
    ++fetched;
    cp_async_fence();
  };
  CUTE_UNROLL
  for (int s = 0; s < kStages - 1; ++s) next(s);
  CUTE_NO_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    next(write);
    write = write + 1 == kStages ? 0 : write + 1;
    CUTE_UNROLL
    for (int k = 0; k < size<2>(rA); ++k) {
      copy(load_a, tXsA(_, _, k, read), tXrA(_, _, k));
      copy(load_b, tXsB(_, _, k, read), tXrB(_, _, k));
      gemm(mma, rA(_, _, k), rB(_, _, k), rC);
    }
    read = read + 1 == kStages ? 0 : read + 1;
  }
  Tensor rounded = make_fragment_like<Elem>(rC);
  CUTE_UNROLL
  for (int i = 0; i < size(rC); ++i) rounded(i) = Elem(rC(i));
  copy(rounded, tCgC);
}
