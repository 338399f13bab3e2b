// One warp multiplies 16 x K by K x 8. CuTe's traits of the atom say which thread holds what: index m + 16 k, n + 8 k, m + 16 n.
#include <cute/atom/mma_traits_sm80.hpp>

struct Args { T const* a; T const* b; float* c; };

template <class A>
CUTE_DEVICE void multiply(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
  A::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
}
template <class A>
CUTE_DEVICE void multiply(float (&c)[4], uint32_t const (&a)[2], uint32_t const (&b)[1]) {
  A::fma(c[0], c[1], c[2], c[3], a[0], a[1], b[0], c[0], c[1], c[2], c[3]);
}

extern "C" __global__ void __launch_bounds__(32) unit(__grid_constant__ Args const args) {
  using Traits = cute::MMA_Traits<Atom>;
  constexpr int K = cute::size<2>(typename Traits::Shape_MNK{});
  int const lane = threadIdx.x;
  uint32_t a[K / 4], b[K / 8];
  float c[4];
  for (int v = 0; v < K / 2; ++v) reinterpret_cast<T*>(a)[v] = args.a[typename Traits::ALayout{}(lane, v)];
  for (int v = 0; v < K / 4; ++v) reinterpret_cast<T*>(b)[v] = args.b[typename Traits::BLayout{}(lane, v)];
  for (int v = 0; v < 4; ++v) c[v] = args.c[typename Traits::CLayout{}(lane, v)];
  multiply<Atom>(c, a, b);
  for (int v = 0; v < 4; ++v) args.c[typename Traits::CLayout{}(lane, v)] = c[v];
}
