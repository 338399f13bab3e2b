// Found before CUTLASS's header of the same name: the atoms in the table mean their emulations from here on; all others stay
// as they are and stop the launch with their name. To add one: a row in the table below, its emulation in host/warp_ops.h, its
// case in tests/units.
#pragma once
#include_next <cute/arch/mma_sm80.hpp>
#include <vidrial/host/runtime.h>

namespace cute {

template <class Element>
struct HostMma16 {
  using DRegisters = float[4]; using ARegisters = uint32_t[4]; using BRegisters = uint32_t[2]; using CRegisters = float[4];
  VIDRIAL_INLINE static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t const& a0, uint32_t const& a1, uint32_t const& a2, uint32_t const& a3,
                  uint32_t const& b0, uint32_t const& b1, float const& c0, float const& c1, float const& c2, float const& c3) {
    vidrial::host::MmaArgument<16> x{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
    vidrial::host::mma<Element, 16>(x);
    d0 = x.c[0]; d1 = x.c[1]; d2 = x.c[2]; d3 = x.c[3];
  }
};

template <class Element>
struct HostMma8 {
  using DRegisters = float[4]; using ARegisters = uint32_t[2]; using BRegisters = uint32_t[1]; using CRegisters = float[4];
  VIDRIAL_INLINE static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t const& a0, uint32_t const& a1, uint32_t const& b0,
                  float const& c0, float const& c1, float const& c2, float const& c3) {
    vidrial::host::MmaArgument<8> x{{a0, a1}, {b0}, {c0, c1, c2, c3}};
    vidrial::host::mma<Element, 8>(x);
    d0 = x.c[0]; d1 = x.c[1]; d2 = x.c[2]; d3 = x.c[3];
  }
};

}  // namespace cute

#define SM80_16x8x16_F32BF16BF16F32_TN HostMma16<::vidrial::host::bf16>
#define SM80_16x8x16_F32F16F16F32_TN   HostMma16<::vidrial::host::fp16>
#define SM80_16x8x8_F32BF16BF16F32_TN  HostMma8<::vidrial::host::bf16>
#define SM80_16x8x8_F32F16F16F32_TN    HostMma8<::vidrial::host::fp16>
