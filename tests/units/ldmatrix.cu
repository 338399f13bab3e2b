// Every lane puts the 8 elements that CuTe's traits say it supplies into a row of its own, and what it gets where they say it
// belongs: so the output is the input, for every number of matrices, transposed or not.
#include <cute/atom/copy_traits_sm75.hpp>

struct Args { uint16_t const* source; uint16_t* target; };

template <class A>
CUTE_DEVICE void load(cute::uint128_t const& row, uint32_t (&r)[1]) { A::copy(row, r[0]); }
template <class A>
CUTE_DEVICE void load(cute::uint128_t const& row, uint32_t (&r)[2]) { A::copy(row, r[0], r[1]); }
template <class A>
CUTE_DEVICE void load(cute::uint128_t const& row, uint32_t (&r)[4]) { A::copy(row, r[0], r[1], r[2], r[3]); }

extern "C" __global__ void __launch_bounds__(32) unit(__grid_constant__ Args const args) {
  using Traits = cute::Copy_Traits<Atom>;
  constexpr int N = cute::extent<typename Atom::DRegisters>::value;
  VIDRIAL_SHARED_MEMORY(raw);
  int const lane = threadIdx.x;
  uint16_t* const row = reinterpret_cast<uint16_t*>(raw) + 8 * lane;
  for (int e = 0; e < 8; ++e) row[e] = args.source[typename Traits::SrcLayout{}(lane, 16 * e) / 16];
  __syncwarp();
  uint32_t r[N];
  load<Atom>(*reinterpret_cast<cute::uint128_t const*>(row), r);
  for (int i = 0; i < 2 * N; ++i) args.target[typename Traits::DstLayout{}(lane, 16 * i) / 16] = uint16_t(r[i / 2] >> (16 * (i % 2)));
}
