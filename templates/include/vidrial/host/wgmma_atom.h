// Host bodies of what vidrial/arch/wgmma.cuh says in PTX on the device.
#pragma once
#include <type_traits>
#include <utility>
#include <vidrial/host/runtime.h>

namespace vidrial {

template <int N, class Element, bool SharedA, bool TransposedB>
struct Wgmma {
  static_assert(N % 8 == 0 && 8 <= N && N <= 256, "wgmma has an n that is a multiple of 8, at most 256");
  static_assert(std::is_same_v<Element, cutlass::bfloat16_t> || std::is_same_v<Element, cutlass::half_t>, "wgmma here multiplies bf16 or fp16");
  static constexpr bool kHalf = std::is_same_v<Element, cutlass::half_t>;
  VIDRIAL_INLINE static void fma(float (&c)[N / 8][4], uint32_t const (&a)[4], uint64_t b, int accumulate = 1) {
    static_assert(!SharedA, "this atom takes A by a descriptor");
    issue({{a[0], a[1], a[2], a[3]}, 0, b, N, kHalf, false, false, TransposedB, false, accumulate != 0}, c, a, std::make_index_sequence<N / 2>());
  }
  VIDRIAL_INLINE static void fma(float (&c)[N / 8][4], uint64_t a, uint64_t b, int accumulate = 1) {
    static_assert(SharedA, "this atom takes A in registers");
    issue({{}, a, b, N, kHalf, true, false, TransposedB, false, accumulate != 0}, c, nullptr, std::make_index_sequence<N / 2>());
  }

 private:
  template <size_t... I>
  VIDRIAL_INLINE static void issue(host::Wgmma const& instruction, float (&c)[N / 8][4], uint32_t const* a, std::index_sequence<I...>) {
    float* const registers[] = {&c[I / 4][I % 4]...};
    host::wgmma(instruction, registers, host::holds_operands() ? a : nullptr);
  }
};

VIDRIAL_INLINE void warpgroup_arrive() { host::wgmma_arrive(); }
VIDRIAL_INLINE void warpgroup_commit() { host::wgmma_commit(); }
template <int Groups>
VIDRIAL_INLINE void warpgroup_wait() {
  static_assert(0 <= Groups && Groups <= 7, "warpgroup_wait<N>: N is 0 to 7");
  host::wgmma_wait_group(Groups);
}

}  // namespace vidrial
