// How threads move tiles (vidrial.layout.copies): cp.async from global to shared memory, ldmatrix and plain vectors into registers.
#pragma once
#include <vidrial/tile/smem.cuh>

namespace vidrial {

// ldmatrix: Row and Column give the 16 bytes whose address a thread supplies.
template <class Atom, class Tile, class Row, class Column>
struct LoadMatrix {
  uint32_t base;
  CUTE_DEVICE explicit LoadMatrix(uint32_t base) : base(base) {}
  // `row` and `column`: where the part of the tile that is read begins.
  CUTE_DEVICE LoadMatrix(uint32_t tile, int thread, int row = 0, int column = 0)
      : base(tile + Tile::offset(row + ThreadMap<Row>::at(thread), column + ThreadMap<Column>::at(thread))) {}
  // `stage` (bytes) is added before the swizzle's XOR: the other order keeps more registers alive.
  template <class... R>
  CUTE_DEVICE void operator()(uint32_t stage, int row, int column, R&... r) const {
    Atom::copy(shared_vector(Tile::at(base + stage, row, column)), r...);
  }
};

// 16 bytes of a row into four registers, without a transposition: Row and Column give the thread's own.
template <class Tile, class Row, class Column>
struct LoadVector {
  uint32_t base;
  CUTE_DEVICE LoadVector(uint32_t tile, int thread, int row = 0, int column = 0)
      : base(tile + Tile::offset(row + ThreadMap<Row>::at(thread), column + ThreadMap<Column>::at(thread))) {}
  CUTE_DEVICE void operator()(int row, int column, uint32_t (&r)[4]) const { load_shared(Tile::at(base, row, column), r); }
};

// Global to shared memory by cp.async, a whole tile by the whole CTA: `Steps` vectors per thread, `RowStep` rows apart.
template <class Atom, class Tile, class Row, class Column, int RowStep, int Steps>
struct TiledCopy {
  using T = typename Tile::T;
  T const* source; int64_t step; uint32_t target; int row;
  CUTE_DEVICE TiledCopy(T const* origin, int64_t row_stride, uint32_t tile, int thread)
      : source(origin + ThreadMap<Row>::at(thread) * row_stride + ThreadMap<Column>::at(thread)), step(RowStep * row_stride),
        target(tile + Tile::offset(ThreadMap<Row>::at(thread), ThreadMap<Column>::at(thread))), row(ThreadMap<Row>::at(thread)) {}
  CUTE_DEVICE void operator()(uint32_t stage, int rows) const {      // rows at and beyond `rows` become zero and are not read
    // NOTE: a tile of more steps, such as Q's, is copied once: unrolled, it costs up to 0.1 s of compile time and gains nothing.
    _Pragma("unroll (Steps > 8 ? 1 : 4)")
    for (int i = 0; i < Steps; ++i) {
      Atom::copy(*reinterpret_cast<cute::uint128_t const*>(source + i * step), shared_vector(Tile::at(target, i * RowStep, 0) + stage), row + i * RowStep < rows);
    }
  }
  CUTE_DEVICE void full(uint32_t stage) const {                      // all rows exist
    CUTE_UNROLL
    for (int i = 0; i < Steps; ++i) {
      Atom::copy(*reinterpret_cast<cute::uint128_t const*>(source + i * step), shared_vector(Tile::at(target, i * RowStep, 0) + stage), true);
    }
  }
};

}  // namespace vidrial
