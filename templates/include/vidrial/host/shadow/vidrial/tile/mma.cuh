// The objects of Vidrial's own header of this name, counted; see copy.cuh beside this file.
#pragma once
#include <vidrial/tile/copy.cuh>

// NOTE: an operand is made of the uncounted load, which would otherwise count as another object's.
#define LoadMatrix UncountedLoadMatrix
#define Operand UncountedOperand
#define TiledMma UncountedTiledMma
#include_next <vidrial/tile/mma.cuh>
#undef LoadMatrix
#undef Operand
#undef TiledMma

namespace vidrial {

template <class Atom, class Tile, class Row, class Column, int Rn, int Cn, int Rk, int Ck>
struct Operand : UncountedOperand<Atom, Tile, Row, Column, Rn, Cn, Rk, Ck> {
  using Uncounted = UncountedOperand<Atom, Tile, Row, Column, Rn, Cn, Rk, Ck>;
  using Uncounted::Uncounted;
  template <class... X>
  void operator()(X&&... x) const {
    host::Counted const self(&host::identity<Operand>);
    Uncounted::operator()(static_cast<X&&>(x)...);
  }
  template <class... X>
  void load(X&&... x) const {
    host::Counted const self(&host::identity<Operand>);
    Uncounted::load(static_cast<X&&>(x)...);
  }
};

template <class Atom, int M, int N, int K, class A, class B, class Row, class Column, int StepM, int StepN>
struct TiledMma : UncountedTiledMma<Atom, M, N, K, A, B, Row, Column, StepM, StepN> {
  using Uncounted = UncountedTiledMma<Atom, M, N, K, A, B, Row, Column, StepM, StepN>;
  template <class... X>
  static void mma_k(X&&... x) {
    host::Counted const self(&host::identity<TiledMma>);
    Uncounted::mma_k(static_cast<X&&>(x)...);
  }
  template <class... X>
  static void gemm(X&&... x) {
    host::Counted const self(&host::identity<TiledMma>);
    Uncounted::gemm(static_cast<X&&>(x)...);
  }
  template <class... X>
  static void multiply(X&&... x) {
    host::Counted const self(&host::identity<TiledMma>);
    Uncounted::multiply(static_cast<X&&>(x)...);
  }
};

}  // namespace vidrial
