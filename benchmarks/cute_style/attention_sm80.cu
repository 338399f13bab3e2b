// Attention forward, full mask, one CTA a tile of queries, written with CuTe's partitions. benchmarks/compile.py holds it beside
// resolved_style/attention_sm80.cu.j2, which does the same work. q, k, v, o: [heads, t, D] bf16.
#include <cute/tensor.hpp>
#pragma nv_hdrstop
using namespace cute;
using Elem = cutlass::bfloat16_t;

struct alignas(8) Args { Elem const* q; Elem const* k; Elem const* v; Elem* o; int t; float scale_log2; };

constexpr int D = {{ d }}, kRows = {{ rows }}, kKeys = {{ keys }}, kWarps = {{ warps }}, kThreads = 32 * kWarps;
using Swizzled = decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_8, _64>, Stride<_64, _1>>{}));
using SmemQ = decltype(tile_to_shape(Swizzled{}, Shape<Int<kRows>, Int<D>>{}));
using SmemK = decltype(tile_to_shape(Swizzled{}, Shape<Int<kKeys>, Int<D>>{}));
using SmemVt = decltype(composition(SmemK{}, make_layout(Shape<Int<D>, Int<kKeys>>{}, GenRowMajor{})));
using FragmentVt = decltype(get_nonswizzle_portion(SmemVt{}));
using Mma = TiledMMA<MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>, Layout<Shape<Int<kWarps>, _1, _1>>, Tile<Int<16 * kWarps>, _16, _16>>;
using Fetch = decltype(make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>, Elem>{},
                                       Layout<Shape<Int<kThreads / (D / 8)>, Int<D / 8>>, Stride<Int<D / 8>, _1>>{}, Layout<Shape<_1, _8>>{}));

// An accumulator ((2, 2), M, N) as rows and columns ((2, M), (2, N)), and as an A operand ((2, 2, 2), M, N / 2).
template <class L>
CUTE_DEVICE auto rows_columns(L layout) {
  auto const l = logical_divide(layout, Shape<_2>{});
  return make_layout(make_layout(get<0, 1>(l), get<1>(l)), make_layout(get<0, 0>(l), get<2>(l)));
}
template <class L>
CUTE_DEVICE auto as_operand(L layout) {
  auto const l = logical_divide(layout, Shape<Underscore, Underscore, _2>{});
  return make_layout(make_layout(get<0>(l), get<2, 0>(l)), get<1>(l), get<2, 1>(l));
}

extern "C" __global__ void __launch_bounds__(kThreads) attention(__grid_constant__ Args const args) {
  extern __shared__ __align__(1024) char raw[];
  int const thread = threadIdx.x;
  int64_t const head = int64_t(blockIdx.y) * args.t * D;
  auto tiles_of = [&](auto* base, auto rows, auto tile) {
    return local_tile(make_tensor(make_gmem_ptr(base + head), make_shape(args.t, Int<D>{}), make_stride(Int<D>{}, _1{})), make_shape(rows, Int<D>{}), make_coord(tile, 0));
  };
  Tensor gQ = tiles_of(args.q, Int<kRows>{}, int(blockIdx.x));
  Tensor gO = tiles_of(args.o, Int<kRows>{}, int(blockIdx.x));
  Tensor gK = tiles_of(args.k, Int<kKeys>{}, _);
  Tensor gV = tiles_of(args.v, Int<kKeys>{}, _);
  Elem* const shared = reinterpret_cast<Elem*>(raw);
  Tensor sQ = make_tensor(make_smem_ptr(shared), SmemQ{});
  Tensor sK = make_tensor(sQ.data() + size(sQ), SmemK{});
  Tensor sV = make_tensor(sK.data() + size(sK), SmemK{});
  Tensor sVt = make_tensor(sV.data(), SmemVt{});

  Fetch fetch;
  auto fetch_thread = fetch.get_slice(thread);
  Tensor tQgQ = fetch_thread.partition_S(gQ);
  Tensor tQsQ = fetch_thread.partition_D(sQ);
  Tensor tKgK = fetch_thread.partition_S(gK);
  Tensor tKsK = fetch_thread.partition_D(sK);
  Tensor tVgV = fetch_thread.partition_S(gV);
  Tensor tVsV = fetch_thread.partition_D(sV);
  Mma mma;
  auto mma_thread = mma.get_slice(thread);
  Tensor rQ = mma_thread.partition_fragment_A(sQ);
  Tensor rK = mma_thread.partition_fragment_B(sK);
  Tensor rV = mma_thread.partition_fragment_B(make_tensor(sV.data().get(), FragmentVt{}));
  auto load_q = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Elem>{}, mma);
  auto load_k = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Elem>{}, mma);
  auto load_v = make_tiled_copy_B(Copy_Atom<SM75_U16x8_LDSM_T, Elem>{}, mma);
  auto load_q_thread = load_q.get_slice(thread);
  auto load_k_thread = load_k.get_slice(thread);
  auto load_v_thread = load_v.get_slice(thread);
  Tensor tXsQ = load_q_thread.partition_S(sQ);
  Tensor tXrQ = load_q_thread.retile_D(rQ);
  Tensor tXsK = load_k_thread.partition_S(sK);
  Tensor tXrK = load_k_thread.retile_D(rK);
  Tensor tXsV = load_v_thread.partition_S(sVt);
  Tensor tXrV = load_v_thread.retile_D(rV);
  Tensor rO = partition_fragment_C(mma, Shape<Int<kRows>, Int<D>>{});
  clear(rO);
  Tensor o = make_tensor(rO.data(), rows_columns(rO.layout()));
  constexpr int kOwn = decltype(size<0>(o))::value;
  float largest[kOwn], sum[kOwn];
  CUTE_UNROLL
  for (int r = 0; r < kOwn; ++r) { largest[r] = -3.402823466e38f; sum[r] = 0.f; }

  int const blocks = args.t / kKeys;
  copy(fetch, tQgQ, tQsQ);
  copy(fetch, tKgK(_, _, _, 0), tKsK);
  cp_async_fence();
  CUTE_NO_UNROLL
  for (int j = 0; j < blocks; ++j) {
    Tensor rS = partition_fragment_C(mma, Shape<Int<kRows>, Int<kKeys>>{});
    clear(rS);
    cp_async_wait<0>();
    __syncthreads();
    copy(fetch, tVgV(_, _, _, j), tVsV);
    cp_async_fence();
    CUTE_UNROLL
    for (int k = 0; k < size<2>(rQ); ++k) {
      copy(load_q, tXsQ(_, _, k), tXrQ(_, _, k));
      copy(load_k, tXsK(_, _, k), tXrK(_, _, k));
      gemm(mma, rQ(_, _, k), rK(_, _, k), rS);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (j + 1 < blocks) copy(fetch, tKgK(_, _, _, j + 1), tKsK);
    cp_async_fence();
    Tensor s = make_tensor(rS.data(), rows_columns(rS.layout()));
    CUTE_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      float m = largest[r];
      CUTE_UNROLL
      for (int c = 0; c < size<1>(s); ++c) m = fmaxf(m, s(r, c));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      float const factor = exp2f((largest[r] - m) * args.scale_log2);
      largest[r] = m;
      sum[r] *= factor;
      CUTE_UNROLL
      for (int c = 0; c < size<1>(s); ++c) { s(r, c) = exp2f((s(r, c) - m) * args.scale_log2); sum[r] += s(r, c); }
      CUTE_UNROLL
      for (int c = 0; c < size<1>(o); ++c) o(r, c) *= factor;
    }
    Tensor rounded = make_fragment_like<Elem>(rS);
    CUTE_UNROLL
    for (int i = 0; i < size(rS); ++i) rounded(i) = Elem(rS(i));
    Tensor rP = make_tensor(rounded.data(), as_operand(rounded.layout()));
    CUTE_UNROLL
    for (int k = 0; k < size<2>(rP); ++k) {
      copy(load_v, tXsV(_, _, k), tXrV(_, _, k));
      gemm(mma, rP(_, _, k), rV(_, _, k), rO);
    }
  }
  CUTE_UNROLL
  for (int r = 0; r < kOwn; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    CUTE_UNROLL
    for (int c = 0; c < size<1>(o); ++c) o(r, c) /= sum[r];
  }
  Tensor rounded = make_fragment_like<Elem>(rO);
  CUTE_UNROLL
  for (int i = 0; i < size(rO); ++i) rounded(i) = Elem(rO(i));
  copy(rounded, mma_thread.partition_C(gO));
}
