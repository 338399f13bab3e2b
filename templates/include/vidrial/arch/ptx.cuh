// The few things that CUDA C++ says only in PTX. The host target has a body of its own for each (host/intrinsics.h).
#pragma once
#ifndef __CUDACC_RTC__
#include <vidrial/host/intrinsics.h>
#else

namespace vidrial {

CUTE_DEVICE float bits_as_float(uint32_t x) { return __uint_as_float(x); }
CUTE_DEVICE void* shared_pointer(uint32_t address) { return __cvta_shared_to_generic(address); }
CUTE_DEVICE uint32_t shared_address(void const* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Two floats rounded to nearest even; `low` lands in the lower half.
// NOTE: volatile, as the product below: both make operands of wgmma, which have to be there before its `arrive`.
CUTE_DEVICE uint32_t pack_bf16(float low, float high) { uint32_t r; asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
CUTE_DEVICE uint32_t pack_fp16(float low, float high) { uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
CUTE_DEVICE float low_fp16(uint32_t x) { float r; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(x)); return r; }
CUTE_DEVICE float high_fp16(uint32_t x) { float r; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(x)); return r; }

// Element-wise product of two pairs, one rounding.
CUTE_DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) { uint32_t r; asm volatile("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u)); return r; }

// One half in both halves. NOTE: written as moves, ptxas folds it into the operand of the multiplication; __byte_perm it does not.
CUTE_DEVICE uint32_t splat_low(uint32_t x) { uint32_t r; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(r) : "r"(x)); return r; }
CUTE_DEVICE uint32_t splat_high(uint32_t x) { uint32_t r; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(r) : "r"(x)); return r; }

// 1/x, one ulp. NOTE: a division, rounded to nearest, has a subroutine for odd cases: 40 instructions each, and a call.
CUTE_DEVICE float reciprocal_approx(float x) { float r; asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }

// 2^x, two ulp, subnormal results flushed to zero.
CUTE_DEVICE float exp2_approx(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }

// The same number, of which the compiler knows nothing: what depends on it is worked out here, not kept in registers from before a loop.
CUTE_DEVICE int opaque(int x) { asm volatile("" : "+r"(x)); return x; }

// What is written to these registers before, or read after it, stays on its side of this.
CUTE_DEVICE void fence_registers(float (&x)[4]) { asm volatile("" : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])); }

// cp.async of 4, 8 or 16 bytes to a shared address, of which the first `bytes` are read and the others become zero. Of 0 nothing is read.
template <int Size>
CUTE_DEVICE void copy_async(uint32_t target, void const* source, int bytes) {
  static_assert(Size == 4 || Size == 8 || Size == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (Size == 16) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(target), "l"(source), "r"(bytes));
  else asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" :: "r"(target), "l"(source), "n"(Size), "r"(bytes));
}

// What this thread has written to shared memory is seen by wgmma and TMA, whose reads go another way; a barrier comes after it.
CUTE_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace vidrial
#endif

namespace vidrial {

CUTE_HOST_DEVICE float low_bf16(uint32_t x) { return bits_as_float(x << 16); }
CUTE_HOST_DEVICE float high_bf16(uint32_t x) { return bits_as_float(x & 0xffff0000u); }

// Pairs of 16-bit elements in one register, by element type.
template <class T> struct Pair;
template <> struct Pair<cutlass::bfloat16_t> {
  CUTE_DEVICE static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  CUTE_DEVICE static uint32_t to_bf16(uint32_t x) { return x; }
  CUTE_DEVICE static float low(uint32_t x) { return low_bf16(x); }
  CUTE_DEVICE static float high(uint32_t x) { return high_bf16(x); }
};
template <> struct Pair<cutlass::half_t> {
  CUTE_DEVICE static uint32_t pack(float low, float high) { return pack_fp16(low, high); }
  CUTE_DEVICE static uint32_t to_bf16(uint32_t x) { return pack_bf16(low_fp16(x), high_fp16(x)); }
  CUTE_DEVICE static float low(uint32_t x) { return low_fp16(x); }
  CUTE_DEVICE static float high(uint32_t x) { return high_fp16(x); }
};

// A pair of bf16 times two float factors: multiplied in float, rounded once.
CUTE_DEVICE uint32_t scale_bf16(uint32_t x, float low, float high) { return pack_bf16(low_bf16(x) * low, high_bf16(x) * high); }

}  // namespace vidrial
