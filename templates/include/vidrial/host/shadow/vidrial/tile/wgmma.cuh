// The objects of Vidrial's own header of this name, counted; see copy.cuh beside this file.
#pragma once
#include <vidrial/arch/wgmma.cuh>
#include <vidrial/tile/smem.cuh>

#define WarpgroupMma UncountedWarpgroupMma
#include_next <vidrial/tile/wgmma.cuh>
#undef WarpgroupMma

namespace vidrial {

template <class Atom, int M, int N, int K, class A, class B, class Row, class Column>
struct WarpgroupMma : UncountedWarpgroupMma<Atom, M, N, K, A, B, Row, Column> {
  using Uncounted = UncountedWarpgroupMma<Atom, M, N, K, A, B, Row, Column>;
  template <class... X>
  static void mma_k(X&&... x) {
    host::Counted const self(&host::identity<WarpgroupMma>);
    Uncounted::mma_k(static_cast<X&&>(x)...);
  }
  template <int Count, class... X>
  static void mma_k(X&&... x) {
    host::Counted const self(&host::identity<WarpgroupMma>);
    Uncounted::template mma_k<Count>(static_cast<X&&>(x)...);
  }
  template <class... X>
  static void gemm(X&&... x) {
    host::Counted const self(&host::identity<WarpgroupMma>);
    host::HeldOperands const held;
    Uncounted::gemm(static_cast<X&&>(x)...);
  }
};

}  // namespace vidrial
