// C[rows][columns] = gelu(A B^T + bias) of any rows, columns and depth by one CTA: copies with tails, the ring, products by mma.sync or wgmma, the
// epilogue.
#include <vidrial/collective/epilogue.cuh>
#include <vidrial/pipeline/ring.cuh>
#include <vidrial/tile/mma.cuh>
using namespace vidrial;
using Elem = Tiles::Elem;
using Out = Tiles::Out::T;

struct Args { Elem const* a; Elem const* b; float const* bias; Out* c; int rows, columns, depth, a_stride, b_stride, c_stride; };

// C += A B of one stage.
template <class Mma>
CUTE_DEVICE void multiply(Fragment<Mma>& c, typename Mma::A const& a, uint32_t a_stage, typename Mma::B const& b, uint32_t b_stage) {
  if constexpr (Mma::kAsync && STEPWISE) {
    CUTE_UNROLL
    for (int k = 0; k < Mma::K; ++k) Mma::mma_k(c.x, a, a_stage, b, b_stage, k);
    Mma::template wait<Mma::K>();
  } else {
    Mma::gemm(c.x, a, a_stage, b, b_stage);
    Mma::template wait<1>();
  }
}

extern "C" __global__ void __launch_bounds__(Tiles::threads) unit(__grid_constant__ Args const args) {
  using Mma = Tiles::Mma;
  constexpr int kDepth = Tiles::depth, kA = Tiles::A::kBytes, kB = Tiles::B::kBytes;
  VIDRIAL_SHARED_MEMORY(raw);
  int const thread = threadIdx.x, steps = (args.depth + kDepth - 1) / kDepth;
  uint32_t const smem = shared_address(raw), a = smem + Tiles::Smem::A, b = smem + Tiles::Smem::B;
  Tiles::CopyA copy_a(args.a, args.a_stride, a, thread);
  Tiles::CopyB copy_b(args.b, args.b_stride, b, thread);
  auto const copy = [&](int item, int stage) {
    if (item < steps) {
      copy_a(stage * kA, args.rows, args.depth - item * kDepth); copy_a.source += kDepth;
      copy_b(stage * kB, args.columns, args.depth - item * kDepth); copy_b.source += kDepth;
    }
  };
  Tiles::Ring ring;
  ring.first(copy);
  Mma::A const load_a(a, thread);
  Mma::B const load_b(b, thread);
  Fragment<Mma> c = {};
  c.fence();
  CUTE_NO_UNROLL
  for (int i = 0; i < steps; ++i) {
    int const stage = ring.next(copy);
    multiply(c, load_a, stage * kA, load_b, stage * kB);
  }
  Mma::wait<0>();
  c.fence();
  cute::cp_async_wait<0>();
  Tiles::Epilogue const epilogue(smem + Tiles::Smem::OUT, thread);
  epilogue(c, args.c, args.c_stride, args.rows, args.columns, [&](float x, int, int column) {
    return gelu(x + (column < args.columns ? args.bias[column] : 0.f));
  });
}
