// wgmma; see mma_sm80.hpp beside this file. Written out, not included: CUTLASS's header has 77000 lines with its extension. Here are
// products of 16-bit floats summed in float32, for the N that CUTLASS has; another atom does not compile.
#pragma once
#include <utility>
#include <cute/config.hpp>
#include <vidrial/host/runtime.h>

namespace cute {

VIDRIAL_INLINE void warpgroup_arrive() { vidrial::host::wgmma_arrive(); }
VIDRIAL_INLINE void warpgroup_commit_batch() { vidrial::host::wgmma_commit(); }
template <int N>
VIDRIAL_INLINE void warpgroup_wait() {
  static_assert(0 <= N && N <= 7, "warpgroup_wait<N>: N is 0 to 7");
  vidrial::host::wgmma_wait_group(N);
}
// Registers are memory here, and calls of the runtime are opaque: nothing to keep the compiler from.
VIDRIAL_INLINE void warpgroup_fence_operand(uint32_t&) {}
VIDRIAL_INLINE void warpgroup_fence_operand(float&) {}

namespace SM90::GMMA {

enum class Major { K = 0, MN = 1 };
enum class ScaleOut { Zero = 0, One = 1 };
enum class ScaleIn { Neg = -1, One = 1 };
enum class SparseSel { Zero = 0, One = 1 };

// One float for each index.
template <size_t> struct HostAccumulator { using type = float; };

template <bool Half, int N, Major MajorA, Major MajorB, ScaleIn ScaleA, ScaleIn ScaleB, class Indices = std::make_index_sequence<N / 2>>
struct HostWgmmaRS;
template <bool Half, int N, Major MajorA, Major MajorB, ScaleIn ScaleA, ScaleIn ScaleB, size_t... I>
struct HostWgmmaRS<Half, N, MajorA, MajorB, ScaleA, ScaleB, std::index_sequence<I...>> {
  static_assert(MajorA == Major::K, "A in registers is K-major");
  using DRegisters = void; using ARegisters = uint32_t[4]; using BRegisters = uint64_t[1]; using CRegisters = float[N / 2];
  VIDRIAL_INLINE static void fma(uint32_t const& a0, uint32_t const& a1, uint32_t const& a2, uint32_t const& a3, uint64_t const& desc_b,
                                 typename HostAccumulator<I>::type&... d, ScaleOut const scale_D = ScaleOut::One) {
    float* const registers[] = {&d...};
    vidrial::host::wgmma({{a0, a1, a2, a3}, 0, desc_b, N, Half, false, false, MajorB == Major::MN, ScaleA != ScaleB, scale_D == ScaleOut::One}, registers);
  }
};

template <bool Half, int N, Major MajorA, Major MajorB, ScaleIn ScaleA, ScaleIn ScaleB, class Indices = std::make_index_sequence<N / 2>>
struct HostWgmmaSS;
template <bool Half, int N, Major MajorA, Major MajorB, ScaleIn ScaleA, ScaleIn ScaleB, size_t... I>
struct HostWgmmaSS<Half, N, MajorA, MajorB, ScaleA, ScaleB, std::index_sequence<I...>> {
  using DRegisters = void; using ARegisters = uint64_t[1]; using BRegisters = uint64_t[1]; using CRegisters = float[N / 2];
  VIDRIAL_INLINE static void fma(uint64_t const& desc_a, uint64_t const& desc_b, typename HostAccumulator<I>::type&... d,
                                 ScaleOut const scale_D = ScaleOut::One) {
    float* const registers[] = {&d...};
    vidrial::host::wgmma({{}, desc_a, desc_b, N, Half, true, MajorA == Major::MN, MajorB == Major::MN, ScaleA != ScaleB, scale_D == ScaleOut::One}, registers);
  }
};

#define VIDRIAL_HOST_WGMMA_ATOM(Name, Base, Half, N)                                                                              \
  template <Major MajorA, Major MajorB, ScaleIn ScaleA = ScaleIn::One, ScaleIn ScaleB = ScaleIn::One>                             \
  struct Name : Base<Half, N, MajorA, MajorB, ScaleA, ScaleB> {};
#define VIDRIAL_HOST_WGMMA(N)                                                     \
  VIDRIAL_HOST_WGMMA_ATOM(MMA_64x##N##x16_F32BF16BF16_RS, HostWgmmaRS, false, N)  \
  VIDRIAL_HOST_WGMMA_ATOM(MMA_64x##N##x16_F32BF16BF16_SS, HostWgmmaSS, false, N)  \
  VIDRIAL_HOST_WGMMA_ATOM(MMA_64x##N##x16_F32F16F16_RS, HostWgmmaRS, true, N)     \
  VIDRIAL_HOST_WGMMA_ATOM(MMA_64x##N##x16_F32F16F16_SS, HostWgmmaSS, true, N)

VIDRIAL_HOST_WGMMA(8)   VIDRIAL_HOST_WGMMA(16)  VIDRIAL_HOST_WGMMA(32)  VIDRIAL_HOST_WGMMA(64)
VIDRIAL_HOST_WGMMA(96)  VIDRIAL_HOST_WGMMA(128) VIDRIAL_HOST_WGMMA(192) VIDRIAL_HOST_WGMMA(256)
#ifdef CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
VIDRIAL_HOST_WGMMA(24)  VIDRIAL_HOST_WGMMA(40)  VIDRIAL_HOST_WGMMA(48)  VIDRIAL_HOST_WGMMA(56)
VIDRIAL_HOST_WGMMA(72)  VIDRIAL_HOST_WGMMA(80)  VIDRIAL_HOST_WGMMA(88)  VIDRIAL_HOST_WGMMA(104)
VIDRIAL_HOST_WGMMA(112) VIDRIAL_HOST_WGMMA(120) VIDRIAL_HOST_WGMMA(136) VIDRIAL_HOST_WGMMA(144)
VIDRIAL_HOST_WGMMA(152) VIDRIAL_HOST_WGMMA(160) VIDRIAL_HOST_WGMMA(168) VIDRIAL_HOST_WGMMA(176)
VIDRIAL_HOST_WGMMA(184) VIDRIAL_HOST_WGMMA(200) VIDRIAL_HOST_WGMMA(208) VIDRIAL_HOST_WGMMA(216)
VIDRIAL_HOST_WGMMA(224) VIDRIAL_HOST_WGMMA(232) VIDRIAL_HOST_WGMMA(240) VIDRIAL_HOST_WGMMA(248)
#endif

#undef VIDRIAL_HOST_WGMMA
#undef VIDRIAL_HOST_WGMMA_ATOM

}  // namespace SM90::GMMA
}  // namespace cute
