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

// Global to shared memory, a whole tile by the whole CTA: `Steps` vectors of 16 bytes per thread, `RowStep` rows apart. Each vector is copied in
// pieces as large as Atom's, for rows that are aligned to no more than these: by cp.async of 16, 8 or 4 bytes; or, element by element, by
// plain loads, which are waited for here and are no part of a group.
template <class Atom, class Tile, class Row, class Column, int RowStep, int Steps>
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
    for (int i = 0; i < Steps; ++i) {
      if constexpr (kPiece == kVector) Atom::copy(*reinterpret_cast<cute::uint128_t const*>(source + i * step), shared_vector(place(stage, i)), row + i * RowStep < rows);
      else pieces(stage, i, row + i * RowStep < rows ? kVector : 0);
    }
  }
  // Rows at and beyond `rows`, and columns at and beyond `columns`, become zero and are not read.
  CUTE_DEVICE void operator()(uint32_t stage, int rows, int columns) const {
    int const left = (columns - column) * int(sizeof(T)), bytes = left < 0 ? 0 : left < kVector ? left : kVector;
    _Pragma("unroll (Steps > 8 ? 1 : 4)")
    for (int i = 0; i < Steps; ++i) pieces(stage, i, row + i * RowStep < rows ? bytes : 0);
  }
  CUTE_DEVICE void full(uint32_t stage) const {                      // all rows exist
    CUTE_UNROLL
    for (int i = 0; i < Steps; ++i) {
      if constexpr (kPiece == kVector) Atom::copy(*reinterpret_cast<cute::uint128_t const*>(source + i * step), shared_vector(place(stage, i)), true);
      else pieces(stage, i, kVector);
    }
  }

 private:
  CUTE_DEVICE uint32_t place(uint32_t stage, int i) const { return Tile::at(target, i * RowStep, 0) + stage; }
  // The vector of step i, of which `bytes` exist.
  CUTE_DEVICE void pieces(uint32_t stage, int i, int bytes) const {
    T const* from = source + i * step;
    if constexpr (kPiece >= 4) {
      CUTE_UNROLL
      for (int at = 0; at < kVector; at += kPiece) {
        int const left = bytes - at;
        copy_async<kPiece>(place(stage, i) + at, from + at / int(sizeof(T)), left < 0 ? 0 : left < kPiece ? left : kPiece);
      }
    } else {
      uint32_t words[kVector / 4];
      CUTE_UNROLL
      for (int w = 0; w < kVector / 4; ++w) {
        uint16_t const* half = reinterpret_cast<uint16_t const*>(from) + 2 * w;
        uint32_t const low = 4 * w < bytes ? half[0] : 0, high = 4 * w + 2 < bytes ? half[1] : 0;
        words[w] = low | high << 16;
      }
      store_shared(place(stage, i), words);
    }
  }
};

}  // namespace vidrial
