// One warpgroup: C[64][N] += A[64][64] B[N][64]^T in four steps of k; index m + 64 k, n + N k, m + 64 n. B, and A if SHARED_A, lie in
// shared memory as CuTe's canonical layouts have it: lines of 16 WIDTH bytes along k or along the other mode, swizzled.
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <vidrial/arch/ptx.cuh>
using namespace cute;
using namespace cute::SM90;

struct Args { T const* a; T const* b; float* c; };

constexpr int kK = 64;
using Lanes = Shape<_4, _8, _4>;
using LayoutC = Layout<Shape<Lanes, Shape<_2, _2, Int<N / 8>>>, Stride<Stride<_128, _1, _16>, Stride<_64, _8, _512>>>;
using LayoutA = Layout<Shape<Lanes, Shape<_2, _2, _2>>, Stride<Stride<_128, _1, _16>, Stride<_64, _8, _512>>>;
#ifdef CHECK_TRAITS
#include <cute/atom/mma_traits_sm90_gmma.hpp>
static_assert(is_same_v<LayoutC, GMMA::CLayout_64xN<N>> && is_same_v<LayoutA, GMMA::ALayout_64x16>, "who holds what is not what CuTe says");
#endif

template <GMMA::Major M, int Rows>
struct SharedTile {
  static constexpr bool kAlongK = M == GMMA::Major::K;
  static constexpr int kLine = 8 * WIDTH, kRows = !kAlongK && Rows < kLine ? kLine : Rows, kBytes = 2 * kRows * kK;
  using Atom = conditional_t<kAlongK, Layout<Shape<_8, Int<kLine>>, Stride<Int<kLine>, _1>>, Layout<Shape<Int<kLine>, _8>, Stride<_1, Int<kLine>>>>;
  using Plain = decltype(tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kK>>{}));
  // In elements of 2 bytes: address bits 4 to 6 take bits 7 to 9.
  using Swizzled = Swizzle<WIDTH == 8 ? 3 : WIDTH == 4 ? 2 : WIDTH == 2 ? 1 : 0, 3, 3>;

  CUTE_DEVICE static void fill(char* base, T const* source) {
    for (int i = threadIdx.x; i < Rows * kK; i += 128) reinterpret_cast<T*>(base)[Swizzled{}(Plain{}(i % Rows, i / Rows))] = source[i];
  }
  CUTE_DEVICE static uint64_t descriptor(char const* base, int step) {
    // To the next 8 of k, and to the rows behind those of one atom.
    int const k = 2 * Plain{}(0, 8), row = 2 * Plain{}((kAlongK ? 8 : kLine) % kRows, 0);
    bool const k_leads = kAlongK || WIDTH == 1;
    GmmaDescriptor d;
    d.bitfield.start_address_ = uint16_t((vidrial::shared_address(base) + 2 * Plain{}(0, 16 * step)) >> 4);
    d.bitfield.leading_byte_offset_ = uint16_t((k_leads ? k : row) >> 4);
    d.bitfield.stride_byte_offset_ = uint16_t((k_leads ? row : k) >> 4);
    d.bitfield.layout_type_ = WIDTH == 8 ? 1 : WIDTH == 4 ? 2 : WIDTH == 2 ? 3 : 0;
    return d;
  }
};
using A = SharedTile<MAJOR_A, 64>;
using B = SharedTile<MAJOR_B, N>;

template <int... I>
CUTE_DEVICE void multiply(float (&c)[N / 2], uint32_t const (&a)[4], uint64_t a_shared, uint64_t b, GMMA::ScaleOut scale, int_sequence<I...>) {
#if SHARED_A
  Instruction::fma(a_shared, b, c[I]..., scale);
#else
  Instruction::fma(a[0], a[1], a[2], a[3], b, c[I]..., scale);
#endif
}

extern "C" __global__ void __launch_bounds__(128) unit(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  char* const shared_a = raw + B::kBytes;
  int const thread = threadIdx.x;
  B::fill(raw, args.b);
  if (SHARED_A) A::fill(shared_a, args.a);
  uint32_t a[kK / 16][4];
  float c[N / 2];
  CUTE_UNROLL
  for (int step = 0; step < kK / 16; ++step)
    CUTE_UNROLL
    for (int v = 0; v < 8; ++v) reinterpret_cast<T*>(a[step])[v] = args.a[LayoutA{}(thread, v) + 64 * 16 * step];
  CUTE_UNROLL
  for (int v = 0; v < N / 2; ++v) c[v] = args.c[LayoutC{}(thread, v)];
  vidrial::fence_async_proxy();
  __syncthreads();
  warpgroup_arrive();
  CUTE_UNROLL
  for (int step = 0; step < kK / 16; ++step) {
    auto const scale = FRESH && step == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
    multiply(c, a[step], A::descriptor(shared_a, step), B::descriptor(raw, step), scale, make_int_sequence<N / 2>{});
  }
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  CUTE_UNROLL
  for (int v = 0; v < N / 2; ++v) args.c[LayoutC{}(thread, v)] = c[v];
}
