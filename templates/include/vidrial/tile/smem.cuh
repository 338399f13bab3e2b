// Shared memory: 32-bit addresses, and tiles described by CuTe layout types that Python resolved and proved.
#pragma once
#include <vidrial/arch/ptx.cuh>
#include <vidrial/tile/layouts.cuh>
#include <vidrial/arch/shared_memory.cuh>

namespace vidrial {

// A tile of T in shared memory. Rows and columns are the tile's own; where an element lies is the layout's affair.
template <class T_, class Layout_> struct SmemTile;

template <class T_, int B, int M, int S, class L>
struct SmemTile<T_, cute::ComposedLayout<cute::Swizzle<B, M, S>, cute::_0, L>> {
  using T = T_;
  using Layout = cute::ComposedLayout<cute::Swizzle<B, M, S>, cute::_0, L>;
  static constexpr int kBytes = Plane<L>::size * int(sizeof(T));
  // Bits below the ones that the swizzle reads.
  static constexpr int kLow = (1 << (M + S)) - 1;

  // Byte offset of (row, column) before the swizzle.
  CUTE_HOST_DEVICE static constexpr uint32_t plain(int row, int column) { return uint32_t(Plane<L>::at(row, column)) * sizeof(T); }

  // Byte offset of (row, column): the only place where the swizzle is evaluated, once a thread.
  CUTE_HOST_DEVICE static constexpr uint32_t offset(int row, int column) {
    int const y = Plane<L>::at(row, column);
    return uint32_t(y ^ (y & ((1 << B) - 1) << (M + S)) >> S) * sizeof(T);
  }

  // Byte address of (r + row, c + column), given that of (r, c): low bits by XOR, high bits by addition.
  // NOTE: true only where L(row, column) has no bit among those the swizzle reads and the sum carries into none;
  // vidrial.layout proves it for every pair that a kernel uses.
  CUTE_HOST_DEVICE static constexpr uint32_t at(uint32_t address, int row, int column) {
    int const y = Plane<L>::at(row, column);
    return (address ^ uint32_t((y & kLow) * int(sizeof(T)))) + uint32_t((y & ~kLow) * int(sizeof(T)));
  }
};

// Without a swizzle an address is a sum.
template <class T_, class Shape, class Stride>
struct SmemTile<T_, cute::Layout<Shape, Stride>> {
  using T = T_;
  using Layout = cute::Layout<Shape, Stride>;
  static constexpr int kBytes = Plane<Layout>::size * int(sizeof(T));
  CUTE_HOST_DEVICE static constexpr uint32_t offset(int row, int column) { return uint32_t(Plane<Layout>::at(row, column)) * sizeof(T); }
  CUTE_HOST_DEVICE static constexpr uint32_t at(uint32_t address, int row, int column) { return address + offset(row, column); }
};

// The 16 bytes at a shared-memory address, as CuTe's copy atoms want them.
CUTE_DEVICE cute::uint128_t& shared_vector(uint32_t address) { return *static_cast<cute::uint128_t*>(shared_pointer(address)); }

CUTE_DEVICE void load_shared(uint32_t address, uint32_t (&r)[4]) {
  uint4 const v = *static_cast<uint4 const*>(shared_pointer(address));
  r[0] = v.x; r[1] = v.y; r[2] = v.z; r[3] = v.w;
}
CUTE_DEVICE float2 load_shared_float2(uint32_t address) { return *static_cast<float2 const*>(shared_pointer(address)); }
CUTE_DEVICE float4 load_shared_float4(uint32_t address) { return *static_cast<float4 const*>(shared_pointer(address)); }
CUTE_DEVICE void store_shared(uint32_t address, uint32_t const (&r)[4]) { *static_cast<uint4*>(shared_pointer(address)) = make_uint4(r[0], r[1], r[2], r[3]); }
CUTE_DEVICE void store_shared(uint32_t address, float2 x) { *static_cast<float2*>(shared_pointer(address)) = x; }
CUTE_DEVICE void store_shared(uint32_t address, uint32_t x) { *static_cast<uint32_t*>(shared_pointer(address)) = x; }

}  // namespace vidrial
