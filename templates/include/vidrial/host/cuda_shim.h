// CUDA C++ as far as g++ has to understand it: qualifiers, types, built-in variables, arithmetic intrinsics.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// A static array lies among the thread-local variables, which are the executable's only ones, wherever it is declared, in a kernel, a helper or a
// template: the runtime can refill them for each CTA, and give their bytes shared-memory addresses. Beside each lies a zone that nothing may touch.
// NOTE: one OS thread runs all threads of a CTA. A section of its own would leave out what a template or an inline function declares.
#define __shared__ static thread_local __attribute__((used)) char VIDRIAL_ZONE(__COUNTER__)[64]; static thread_local
#define VIDRIAL_ZONE(number) VIDRIAL_ZONE_(number)
#define VIDRIAL_ZONE_(number) vidrial_zone_##number

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

using std::max;
using std::min;

namespace vidrial::host {
template <class To, class From>
inline To bits(From const& x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace vidrial::host

inline float __uint_as_float(unsigned x) { return vidrial::host::bits<float>(x); }
inline float __int_as_float(int x) { return vidrial::host::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return vidrial::host::bits<unsigned>(x); }
inline int __float_as_int(float x) { return vidrial::host::bits<int>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return int(std::floor(x)); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mulhi(int x, int y) { return int((int64_t(x) * y) >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t const both = x | uint64_t(y) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned const choice = selector >> (4 * i), byte = unsigned(both >> (8 * (choice & 7))) & 0xff;
    result |= (choice & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return result;
}
template <class T> inline T __ldg(T const* p) { return *p; }
template <class T> inline T __ldcg(T const* p) { return *p; }
template <class T> inline T __ldcs(T const* p) { return *p; }
template <class T> inline void __stcg(T* p, T x) { *p = x; }
template <class T> inline void __stcs(T* p, T x) { *p = x; }
inline void __threadfence() {}
inline void __threadfence_block() {}
