// A tile of results from accumulators to global memory (vidrial.layout.epilogue): through a swizzled tile in shared memory, so that neighbouring
// threads store neighbouring 16 bytes of a row. Rows and columns that do not exist are not written.
//
//   vidrial::Epilogue...  epilogue(tile, thread);        // the tile may lie where the ring's stages were
//   epilogue(c, y, stride, rows, columns, [&](float x, int row, int column) { return gelu(x + bias[column]); });
#pragma once
#include <vidrial/tile/copy.cuh>
#include <vidrial/tile/fragment.cuh>

namespace vidrial {

// What an epilogue does to a result: nothing.
struct AsIs {
  CUTE_DEVICE float operator()(float x, int, int) const { return x; }
};
CUTE_DEVICE float relu(float x) { return fmaxf(x, 0.f); }
// By tanh, as 1 / (1 + e^-2z).
CUTE_DEVICE float gelu(float x) {
  float const z = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x * reciprocal_approx(1.f + exp2_approx(-2.885390082f * z));
}

// How all threads of the CTA meet between the steps of an epilogue.
struct AllThreads {
  CUTE_DEVICE void operator()() const { __syncthreads(); }
};

// Row, Column, RowStep, Steps: the thread's 16 bytes on the way out. Atom: as large as the rows of the target are aligned to. Parts: the tile
// holds so small a part of the columns, and is filled and stored as often.
template <class Atom, class Mma, class Tile, class Row, class Column, int RowStep, int Steps, int Parts = 1>
struct Epilogue {
  using T = typename Tile::T;
  static constexpr int kVector = 16, kPiece = sizeof(typename Atom::SRegisters), kElements = kVector / int(sizeof(T));
  static constexpr int kParts = Parts, kBlocks = Mma::N / Parts;
  uint32_t tile; int thread;
  CUTE_DEVICE Epilogue(uint32_t tile, int thread) : tile(tile), thread(thread) {}

  // All of it, barriers included. `target`: the tile's first element; `f(x, row, column)`: what is stored for x of this place in the tile.
  // `meet()`: the barrier of the threads that take part, where these are not all of the CTA.
  template <class F = AsIs, class Meet = AllThreads>
  CUTE_DEVICE void operator()(Fragment<Mma> const& c, T* target, int64_t stride, int rows, int columns, F&& f = F{}, Meet&& meet = Meet{}) const {
    CUTE_UNROLL
    for (int part = 0; part < Parts; ++part) {
      int const first = Parts == 1 ? 0 : Mma::column_of(part * kBlocks, 0);
      meet();                                          // nobody reads what lay there
      put(c, f, part);
      meet();
      store(target + first, stride, rows, columns - first);
    }
  }
  // Into shared memory, one of the parts.
  template <class F>
  CUTE_DEVICE void put(Fragment<Mma> const& c, F&& f, int part = 0) const {
    int const row = Mma::row(thread), column = Mma::column(thread);
    uint32_t const base = tile + Tile::offset(row, column);
    CUTE_UNROLL
    for (int m = 0; m < Mma::M; ++m) {
      CUTE_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        int const n = part * kBlocks + b;
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          int const r = Mma::row_of(m, 2 * h), j = Mma::column_of(n, 0), at = Mma::column_of(b, 0);
          float const low = f(c.x[m][n][2 * h], row + r, column + j), high = f(c.x[m][n][2 * h + 1], row + r, column + j + 1);
          if constexpr (sizeof(T) == 4) store_shared(Tile::at(base, r, at), make_float2(low, high));
          else store_shared(Tile::at(base, r, at), Pair<T>::pack(low, high));
        }
      }
    }
  }
  // And from there, behind a barrier, to memory: `rows` and `columns` of the tile exist.
  CUTE_DEVICE void store(T* target, int64_t stride, int rows, int columns) const {
    int const row = ThreadMap<Row>::at(thread), column = ThreadMap<Column>::at(thread), left = columns - column;
    uint32_t const base = tile + Tile::offset(row, column);
    T* to = target + row * stride + column;
    CUTE_UNROLL
    for (int i = 0; i < Steps; ++i, to += RowStep * stride) {
      uint32_t x[4];
      load_shared(Tile::at(base, i * RowStep, 0), x);
      if (row + i * RowStep < rows) {
        if (left >= kElements) whole(to, x);
        else part(to, x, left);
      }
    }
  }

 private:
  CUTE_DEVICE static void whole(T* to, uint32_t const (&x)[4]) {
    if constexpr (kPiece == 16) *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
    else if constexpr (kPiece == 8) {
      reinterpret_cast<uint2*>(to)[0] = make_uint2(x[0], x[1]);
      reinterpret_cast<uint2*>(to)[1] = make_uint2(x[2], x[3]);
    } else if constexpr (kPiece == 4) {
      CUTE_UNROLL
      for (int w = 0; w < 4; ++w) reinterpret_cast<uint32_t*>(to)[w] = x[w];
    } else part(to, x, kElements);
  }
  CUTE_DEVICE static void part(T* to, uint32_t const (&x)[4], int elements) {
    CUTE_UNROLL
    for (int e = 0; e < kElements; ++e) {
      if (e < elements) {
        if constexpr (sizeof(T) == 4) reinterpret_cast<uint32_t*>(to)[e] = x[e];
        else reinterpret_cast<uint16_t*>(to)[e] = uint16_t(x[e / 2] >> (16 * (e % 2)));
      }
    }
  }
};

}  // namespace vidrial
