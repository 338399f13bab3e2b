// What kernels use of CuTe, under CuTe's names: layout types, whose algebra Python has worked out already, and bare instruction atoms.
// NOTE: CuTe's own headers give the same instructions (tests/build/test_cute_headers.py), but are 4 MB of C++: 0.9 s of every compile, 0.12 s
// where they are precompiled. A kernel that needs more of CuTe includes <cute/tensor.hpp> before <vidrial/prelude.cuh>, and gets CuTe's
// own of everything below; so does the host target.
#pragma once
#if !defined(__CUDACC_RTC__) || defined(__CUTE_REQUIRES)
#include <cute/config.hpp>
#include <cute/swizzle_layout.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cutlass/numeric_types.h>
#else
#include <cuda/std/cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// NOTE: word for word as in <cute/config.hpp>, which may be included later.
#define CUTE_HOST_DEVICE __forceinline__ __host__ __device__
#define CUTE_DEVICE      __forceinline__          __device__
#define CUTE_UNROLL    _Pragma("unroll")
#define CUTE_NO_UNROLL _Pragma("unroll 1")

namespace cutlass {

using bfloat16_t = __nv_bfloat16;
using half_t = __half;

}  // namespace cutlass

namespace cute {

template <auto> struct C;
template <int N> using Int = C<N>;
using _0 = Int<0>;
template <class...> struct tuple;
template <class... T> using Shape = tuple<T...>;
template <class... T> using Stride = tuple<T...>;
template <class Shape, class Stride> struct Layout;
template <int B, int M, int S> struct Swizzle;
template <class Function, class Offset, class Layout> struct ComposedLayout;

template <size_t...> struct index_sequence {};
template <class, class> struct Joined;
template <size_t... I, size_t... J>
struct Joined<index_sequence<I...>, index_sequence<J...>> { using type = index_sequence<I..., sizeof...(I) + J...>; };
template <size_t N> struct Indices : Joined<typename Indices<N / 2>::type, typename Indices<N - N / 2>::type> {};
template <> struct Indices<0> { using type = index_sequence<>; };
template <> struct Indices<1> { using type = index_sequence<0>; };
template <size_t N> using make_index_sequence = typename Indices<N>::type;

struct alignas(16) uint128_t { uint64_t low, high; };

CUTE_DEVICE uint32_t cast_smem_ptr_to_uint(void const* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// mma.sync, float32 accumulators: D = A B + C.
#define VIDRIAL_MMA(T, type)                                                                                                        \
  struct SM80_16x8x16_F32##T##T##F32_TN {                                                                                           \
    using DRegisters = float[4]; using ARegisters = uint32_t[4]; using BRegisters = uint32_t[2]; using CRegisters = float[4];       \
    CUTE_DEVICE static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,     \
                                uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {                                 \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                                   \
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                            \
                   : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)                                                                         \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));                     \
    }                                                                                                                               \
  };                                                                                                                                \
  struct SM80_16x8x8_F32##T##T##F32_TN {                                                                                            \
    using DRegisters = float[4]; using ARegisters = uint32_t[2]; using BRegisters = uint32_t[1]; using CRegisters = float[4];       \
    CUTE_DEVICE static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t b0,                  \
                                float c0, float c1, float c2, float c3) {                                                           \
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};" \
                   : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3) : "r"(a0), "r"(a1), "r"(b0), "f"(c0), "f"(c1), "f"(c2), "f"(c3));       \
    }                                                                                                                               \
  };
VIDRIAL_MMA(BF16, "bf16")
VIDRIAL_MMA(F16, "f16")
#undef VIDRIAL_MMA

// ldmatrix of 1, 2 or 4 matrices: a thread names the 16 bytes of one row.
#define VIDRIAL_LDMATRIX(One, Two, Four, trans)                                                                                     \
  struct One {                                                                                                                      \
    using SRegisters = uint128_t[1]; using DRegisters = uint32_t[1];                                                                \
    CUTE_DEVICE static void copy(uint128_t const& row, uint32_t& d) {                                                               \
      asm volatile("ldmatrix.sync.aligned.x1" trans ".m8n8.shared.b16 {%0}, [%1];" : "=r"(d) : "r"(cast_smem_ptr_to_uint(&row)));   \
    }                                                                                                                               \
  };                                                                                                                                \
  struct Two {                                                                                                                      \
    using SRegisters = uint128_t[1]; using DRegisters = uint32_t[2];                                                                \
    CUTE_DEVICE static void copy(uint128_t const& row, uint32_t& d0, uint32_t& d1) {                                                \
      asm volatile("ldmatrix.sync.aligned.x2" trans ".m8n8.shared.b16 {%0, %1}, [%2];"                                              \
                   : "=r"(d0), "=r"(d1) : "r"(cast_smem_ptr_to_uint(&row)));                                                        \
    }                                                                                                                               \
  };                                                                                                                                \
  struct Four {                                                                                                                     \
    using SRegisters = uint128_t[1]; using DRegisters = uint32_t[4];                                                                \
    CUTE_DEVICE static void copy(uint128_t const& row, uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3) {                    \
      asm volatile("ldmatrix.sync.aligned.x4" trans ".m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"                                      \
                   : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3) : "r"(cast_smem_ptr_to_uint(&row)));                                    \
    }                                                                                                                               \
  };
VIDRIAL_LDMATRIX(SM75_U32x1_LDSM_N, SM75_U32x2_LDSM_N, SM75_U32x4_LDSM_N, "")
VIDRIAL_LDMATRIX(SM75_U16x2_LDSM_T, SM75_U16x4_LDSM_T, SM75_U16x8_LDSM_T, ".trans")
#undef VIDRIAL_LDMATRIX

// cp.async through L1 (ca) or past it (cg). ZFILL: zeros, and nothing is read, unless `wanted`.
#define VIDRIAL_CP_ASYNC(Name, cache, accepted)                                                                                     \
  template <class S, class D = S>                                                                                                   \
  struct Name {                                                                                                                     \
    using SRegisters = S[1]; using DRegisters = D[1];                                                                               \
    static_assert(sizeof(S) == sizeof(D) && (accepted), "cp.async copies 4, 8 or 16 bytes, past L1 16");                            \
    CUTE_DEVICE static void copy(S const& source, D& target) {                                                                      \
      asm volatile("cp.async." cache ".shared.global.L2::128B [%0], [%1], %2;"                                                      \
                   :: "r"(cast_smem_ptr_to_uint(&target)), "l"(&source), "n"(sizeof(S)));                                           \
    }                                                                                                                               \
  };                                                                                                                                \
  template <class S, class D = S>                                                                                                   \
  struct Name##_ZFILL : Name<S, D> {                                                                                                \
    CUTE_DEVICE static void copy(S const& source, D& target, bool wanted) {                                                         \
      int const bytes = wanted ? sizeof(S) : 0;                                                                                     \
      asm volatile("cp.async." cache ".shared.global.L2::128B [%0], [%1], %2, %3;"                                                  \
                   :: "r"(cast_smem_ptr_to_uint(&target)), "l"(&source), "n"(sizeof(S)), "r"(bytes));                               \
    }                                                                                                                               \
  };
VIDRIAL_CP_ASYNC(SM80_CP_ASYNC_CACHEALWAYS, "ca", sizeof(S) == 4 || sizeof(S) == 8 || sizeof(S) == 16)
VIDRIAL_CP_ASYNC(SM80_CP_ASYNC_CACHEGLOBAL, "cg", sizeof(S) == 16)
#undef VIDRIAL_CP_ASYNC

CUTE_DEVICE void cp_async_fence() { asm volatile("cp.async.commit_group;"); }
// Until at most the last N groups are under way.
template <int N>
CUTE_DEVICE void cp_async_wait() {
  if constexpr (N == 0) asm volatile("cp.async.wait_all;");
  else asm volatile("cp.async.wait_group %0;" :: "n"(N));
}

template <class S, class D = S>
struct UniversalCopy {
  using SRegisters = S[1]; using DRegisters = D[1];
  CUTE_DEVICE static void copy(S const& source, D& target) { target = source; }
};

}  // namespace cute
#endif
