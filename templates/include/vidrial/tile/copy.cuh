// How threads move tiles (vidrial.layout.copies): cp.async from global to shared memory, ldmatrix and plain vectors into registers.
#pragma once
#include <vidrial/tile/smem.cuh>

namespace vidrial {

// ldmatrix: Row and Column give the 16 bytes whose address a thread supplies.
template <class Atom, class Tile, class Row, class Column>
struct LoadMatrix {
  using T = typename Tile::T;
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

// Global to shared memory, a whole tile by the whole CTA: `Steps` rows per thread, `RowStep` apart, and of each `Columns` vectors of 16 bytes,
// `ColumnStep` elements apart. Each vector is copied in pieces as large as Atom's, for rows that are aligned to no more than these: by cp.async
// of 16, 8 or 4 bytes; or, element by element, by plain loads, which are waited for here and are no part of a group.
template <class Atom, class Tile, class Row, class Column, int RowStep, int Steps, int ColumnStep = 0, int Columns = 1>
struct TiledCopy {
  using T = typename Tile::T;
  static constexpr int kVector = 16, kPiece = sizeof(typename Atom::SRegisters);
  T const* source; int64_t step; uint32_t target; int row, column;
  CUTE_DEVICE TiledCopy(T const* origin, int64_t row_stride, uint32_t tile, int thread)
      : source(origin + ThreadMap<Row>::at(thread) * row_stride + ThreadMap<Column>::at(thread)), step(RowStep * row_stride),
        target(tile + Tile::offset(ThreadMap<Row>::at(thread), ThreadMap<Column>::at(thread))), row(ThreadMap<Row>::at(thread)),
        column(ThreadMap<Column>::at(thread)) {}
  CUTE_DEVICE void operator()(uint32_t stage, int rows) const {      // rows at and beyond `rows` become zero and are not read
    // NOTE: a tile of more steps, such as Q's, is copied once: unrolled, it costs up to 0.1 s of compile time and gains nothing.
    _Pragma("unroll (Steps > 8 ? 1 : 4)")
    for (int i = 0; i < Steps; ++i) copy_row(stage, i, source + i * step, row + i * RowStep < rows);
  }
  // Rows at and beyond `rows`, and columns at and beyond `columns`, become zero and are not read.
  CUTE_DEVICE void operator()(uint32_t stage, int rows, int columns) const {
    _Pragma("unroll (Steps > 8 ? 1 : 4)")
    for (int i = 0; i < Steps; ++i) {
      CUTE_UNROLL
      for (int c = 0; c < Columns; ++c) {
        int const left = (columns - column - c * ColumnStep) * int(sizeof(T)), bytes = left < 0 ? 0 : left < kVector ? left : kVector;
        pieces(place(stage, i, c), source + i * step + c * ColumnStep, row + i * RowStep < rows ? bytes : 0);
      }
    }
  }
  CUTE_DEVICE void full(uint32_t stage) const {                      // all rows exist
    CUTE_UNROLL
    for (int i = 0; i < Steps; ++i) copy_row(stage, i, source + i * step, true);
  }
  // Rows from anywhere: row r begins place(r) elements beyond `origin`; the copy was made with a row stride of 0.
  template <class Place>
  CUTE_DEVICE void gather(uint32_t stage, int rows, Place&& place) const {
    CUTE_NO_UNROLL
    for (int i = 0; i < Steps; ++i) copy_row(stage, i, source + place(row + i * RowStep), row + i * RowStep < rows);
  }

 private:
  CUTE_DEVICE uint32_t place(uint32_t stage, int i, int c) const { return Tile::at(target, i * RowStep, c * ColumnStep) + stage; }
  CUTE_DEVICE void copy_row(uint32_t stage, int i, T const* from, bool exists) const {
    CUTE_UNROLL
    for (int c = 0; c < Columns; ++c) {
      if constexpr (kPiece == kVector) Atom::copy(*reinterpret_cast<cute::uint128_t const*>(from + c * ColumnStep), shared_vector(place(stage, i, c)), exists);
      else pieces(place(stage, i, c), from + c * ColumnStep, exists ? kVector : 0);
    }
  }
  // The vector at `from`, of which `bytes` exist.
  CUTE_DEVICE void pieces(uint32_t place, T const* from, int bytes) const {
    if constexpr (kPiece >= 4) {
      CUTE_UNROLL
      for (int at = 0; at < kVector; at += kPiece) {
        int const left = bytes - at;
        copy_async<kPiece>(place + at, from + at / int(sizeof(T)), left < 0 ? 0 : left < kPiece ? left : kPiece);
      }
    } else {
      uint32_t words[kVector / 4];
      CUTE_UNROLL
      for (int w = 0; w < kVector / 4; ++w) {
        uint16_t const* half = reinterpret_cast<uint16_t const*>(from) + 2 * w;
        uint32_t const low = 4 * w < bytes ? half[0] : 0, high = 4 * w + 2 < bytes ? half[1] : 0;
        words[w] = low | high << 16;
      }
      store_shared(place, words);
    }
  }
};

}  // namespace vidrial
