// A tile of a tensor in global memory, brought into shared memory by TMA (vidrial.layout.tma).
#pragma once
#include <vidrial/arch/tma.cuh>
#include <vidrial/tile/smem.cuh>

namespace vidrial {

// `Packed` members of one row of the tensor are rows of the tile, then those of the next; `row` is then a multiple of Packed.
// Columns lie in `Blocks` blocks of `Block`. `Split`: they are a dimension of the tensor, and one box holds them all; else each is a box.
template <class Tile, int Block, int Blocks, bool Split, int Packed = 1>
struct TmaTile {
  static constexpr int kBytes = Tile::kBytes;
  // By one thread: the tile at (row, column, outer...), `column` a multiple of Block. What lies beyond the tensor's ends becomes zero.
  template <class... C>
  CUTE_DEVICE static void load(TensorMap const& map, uint32_t barrier, uint32_t target, uint64_t hint, int row, int column, C... outer) {
    if constexpr (Split) {
      if constexpr (Packed == 1) tma_load(map, barrier, target, hint, 0, row, column / Block, outer...);
      else tma_load(map, barrier, target, hint, 0, 0, row / Packed, column / Block, outer...);
    } else {
      CUTE_UNROLL
      for (int i = 0; i < Blocks; ++i) {
        if constexpr (Packed == 1) tma_load(map, barrier, target + i * (kBytes / Blocks), hint, column + i * Block, row, outer...);
        else tma_load(map, barrier, target + i * (kBytes / Blocks), hint, column + i * Block, 0, row / Packed, outer...);
      }
    }
  }

  // Of a map of sequences packed one behind the other (TensorMap.ragged, `longest` rows at most): rows at and beyond `end` become zeros.
  template <class... C>
  CUTE_DEVICE static void load_ragged(TensorMap const& map, uint32_t barrier, uint32_t target, uint64_t hint, int longest, int end, int row, int column, C... outer) {
    load(map, barrier, target, hint, longest - end + row, column, outer..., end);
  }
};

}  // namespace vidrial
