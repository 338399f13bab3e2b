// The objects of Vidrial's own header of this name, counted; see copy.cuh beside this file.
#pragma once
#include <vidrial/arch/tma.cuh>
#include <vidrial/tile/smem.cuh>

#define TmaTile UncountedTmaTile
#include_next <vidrial/tile/tma.cuh>
#undef TmaTile

namespace vidrial {

template <class Tile, int Block, int Blocks, bool Split, int Packed = 1>
struct TmaTile : UncountedTmaTile<Tile, Block, Blocks, Split, Packed> {
  template <class... X>
  static void load(X&&... x) {
    host::Counted const self(&host::identity<TmaTile>);
    UncountedTmaTile<Tile, Block, Blocks, Split, Packed>::load(static_cast<X&&>(x)...);
  }
  template <class... X>
  static void load_ragged(X&&... x) {
    host::Counted const self(&host::identity<TmaTile>);
    UncountedTmaTile<Tile, Block, Blocks, Split>::load_ragged(static_cast<X&&>(x)...);
  }
};

}  // namespace vidrial
