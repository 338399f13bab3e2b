// ldmatrix; see mma_sm80.hpp beside this file.
#pragma once
#include_next <cute/arch/copy_sm75.hpp>
#include <vidrial/host/runtime.h>

namespace cute {

template <int Matrices, bool Transposed>
struct HostLoadMatrix {
  using SRegisters = uint128_t[1]; using DRegisters = uint32_t[Matrices];
  template <class... Registers>
  VIDRIAL_INLINE static void copy(uint128_t const& row, Registers&... registers) {
    static_assert(sizeof...(Registers) == Matrices, "ldmatrix fills one register for each matrix");
    uint32_t result[Matrices];
    vidrial::host::ldmatrix<Matrices, Transposed>(&row, result);
    int i = 0;
    ((registers = result[i++]), ...);
  }
};
struct HostLoadMatrixX1 : HostLoadMatrix<1, false> {};
struct HostLoadMatrixX2 : HostLoadMatrix<2, false> {};
struct HostLoadMatrixX4 : HostLoadMatrix<4, false> {};
struct HostLoadMatrixTransposedX1 : HostLoadMatrix<1, true> {};
struct HostLoadMatrixTransposedX2 : HostLoadMatrix<2, true> {};
struct HostLoadMatrixTransposedX4 : HostLoadMatrix<4, true> {};

}  // namespace cute

#define SM75_U32x1_LDSM_N HostLoadMatrixX1
#define SM75_U32x2_LDSM_N HostLoadMatrixX2
#define SM75_U32x4_LDSM_N HostLoadMatrixX4
#define SM75_U16x2_LDSM_T HostLoadMatrixTransposedX1
#define SM75_U16x4_LDSM_T HostLoadMatrixTransposedX2
#define SM75_U16x8_LDSM_T HostLoadMatrixTransposedX4
