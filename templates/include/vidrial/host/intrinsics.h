// Host bodies of what vidrial/arch/ptx.cuh says in PTX on the device.
#pragma once
#include <vidrial/host/runtime.h>

namespace vidrial {

inline float bits_as_float(uint32_t x) { return host::bits<float>(x); }

inline void* shared_pointer(uint32_t address) {
  return address < host::kStaticAddress ? host::shared_base + address : host::static_begin + (address - host::kStaticAddress);
}
inline uint32_t shared_address(void const* pointer) {
  char const* const p = static_cast<char const*>(pointer);
  if (p >= host::shared_base && p <= host::shared_base + host::shared_bytes) return uint32_t(p - host::shared_base);
  if (p >= host::static_begin && p < host::static_end) return host::kStaticAddress + uint32_t(p - host::static_begin);
  host::fatal("shared_address: %p is not in shared memory", pointer);
}

inline uint32_t round_to_bf16(float x) {
  uint32_t const u = host::bits<uint32_t>(x);
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_to_bf16(low) | round_to_bf16(high) << 16; }
inline uint32_t pack_fp16(float low, float high) { return host::bits<uint32_t>(__floats2half2_rn(low, high)); }
inline float low_fp16(uint32_t x) { return __half2float(__ushort_as_half(uint16_t(x))); }
inline float high_fp16(uint32_t x) { return __half2float(__ushort_as_half(uint16_t(x >> 16))); }

// The product of two bf16 is exact in float.
inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  return pack_bf16(bits_as_float(a << 16) * bits_as_float(b << 16), bits_as_float(a & 0xffff0000u) * bits_as_float(b & 0xffff0000u));
}
inline uint32_t splat_low(uint32_t x) { return (x & 0xffffu) * 0x10001u; }
inline uint32_t splat_high(uint32_t x) { return (x >> 16) * 0x10001u; }

inline int opaque(int x) { return x; }

// Registers are memory here, and calls of the runtime are opaque: nothing to keep the compiler from.
template <class T>
inline void fence_registers(T (&)[4]) {}

template <int Size>
VIDRIAL_INLINE void copy_async(uint32_t target, void const* source, int bytes) {
  static_assert(Size == 4 || Size == 8 || Size == 16, "cp.async copies 4, 8 or 16 bytes");
  host::cp_async(shared_pointer(target), source, Size, bytes);
}

inline void fence_async_proxy() { host::fence_async_proxy(); }

inline float reciprocal_approx(float x) { return 1.0f / x; }

inline float exp2_approx(float x) {
  float const y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace vidrial
