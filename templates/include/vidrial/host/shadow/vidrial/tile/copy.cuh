// Found before Vidrial's own header of this name: its objects, each naming itself as the one whose instructions are counted from here on.
// What a GPU compiles has no trace of that. The innermost object counts: the loads of a TiledMma's operand are the operand's.
#pragma once
#include <vidrial/tile/smem.cuh>

#define LoadMatrix UncountedLoadMatrix
#define LoadVector UncountedLoadVector
#define TiledCopy UncountedTiledCopy
#include_next <vidrial/tile/copy.cuh>
#undef LoadMatrix
#undef LoadVector
#undef TiledCopy

namespace vidrial {

template <class Atom, class Tile, class Row, class Column>
struct LoadMatrix : UncountedLoadMatrix<Atom, Tile, Row, Column> {
  using Uncounted = UncountedLoadMatrix<Atom, Tile, Row, Column>;
  using Uncounted::Uncounted;
  template <class... X>
  void operator()(X&&... x) const {
    host::Counted const self(&host::identity<LoadMatrix>);
    Uncounted::operator()(static_cast<X&&>(x)...);
  }
};

template <class Tile, class Row, class Column>
struct LoadVector : UncountedLoadVector<Tile, Row, Column> {
  using Uncounted = UncountedLoadVector<Tile, Row, Column>;
  using Uncounted::Uncounted;
  void operator()(int row, int column, uint32_t (&r)[4]) const {
    host::Counted const self(&host::identity<LoadVector>);
    host::count_shared_load(Tile::at(this->base, row, column));
    Uncounted::operator()(row, column, r);
  }
};

template <class Atom, class Tile, class Row, class Column, int RowStep, int Steps, int ColumnStep = 0, int Columns = 1>
struct TiledCopy : UncountedTiledCopy<Atom, Tile, Row, Column, RowStep, Steps, ColumnStep, Columns> {
  using Uncounted = UncountedTiledCopy<Atom, Tile, Row, Column, RowStep, Steps, ColumnStep, Columns>;
  using Uncounted::Uncounted;
  template <class... X>
  void operator()(X&&... x) const {
    host::Counted const self(&host::identity<TiledCopy>);
    host::count_copy();
    Uncounted::operator()(static_cast<X&&>(x)...);
  }
  void full(uint32_t stage) const {
    host::Counted const self(&host::identity<TiledCopy>);
    host::count_copy();
    Uncounted::full(stage);
  }
  template <class Place>
  void gather(uint32_t stage, int rows, Place&& place) const {
    host::Counted const self(&host::identity<TiledCopy>);
    host::count_copy();
    Uncounted::gather(stage, rows, place);
  }
};

}  // namespace vidrial
