// Which tile a CTA works on next (vidrial.layout.schedule, which has the same order in Python).
#pragma once
#include <vidrial/pipeline/tma_ring.cuh>
#include <vidrial/tile/smem.cuh>

namespace vidrial {

struct TilePlace { int row, column; };

// Columns come in `groups` of equal size, the first ones one larger; within a group row after row, the last row first if it is the heaviest.
template <bool Heavy>
CUTE_DEVICE TilePlace tile_place(int tile, int rows, int columns, int groups) {
  int const size = columns / groups, larger = columns - size * groups, border = larger * (size + 1) * rows;
  bool const wide = tile < border;
  int const width = wide ? size + 1 : size, t = wide ? tile : tile - border, group = t / (width * rows), r = t - group * width * rows, row = r / width;
  return {Heavy ? rows - 1 - row : row, (wide ? 0 : larger * (size + 1)) + group * width + r - row * width};
}

// One: a CTA per tile. Static: the CTAs that there are take turns. Dynamic: they draw tiles from a counter in global memory; the producer
// warp draws, and hands on to `Consumers` warps, two tiles ahead at most, by barriers from byte `At` of their region on.
// NOTE: the counter is 0 before the launch and belongs to it alone, as a zeroed workspace buffer of the op does: two streams must not share it.
enum class Schedule { One, Static, Dynamic };

template <Schedule Kind, bool Heavy, int Consumers, int At>
struct Scheduler {
  static constexpr bool kDynamic = Kind == Schedule::Dynamic;
  static constexpr int kFull = At, kEmpty = At + 16, kSlots = At + 32;
  CUTE_DEVICE static void init(uint32_t barriers, char const* full, char const* empty) {
    if constexpr (kDynamic) {
      init_barriers<2>(barriers + kFull, 1, full);
      init_barriers<2>(barriers + kEmpty, Consumers, empty);
    }
  }
  CUTE_DEVICE static TilePlace place(int tile, int rows, int columns, int groups) { return tile_place<Heavy>(tile, rows, columns, groups); }
  CUTE_DEVICE static int first() { return blockIdx.x; }
  // The tile after this one; as many as there are, or more, if there is none.
  CUTE_DEVICE static int following(int tile, int tiles) { return Kind == Schedule::One ? tiles : tile + int(gridDim.x); }

  // One whole warp.
  struct Producer {
    uint32_t barriers; int turn = 0;
    CUTE_DEVICE explicit Producer(uint32_t barriers) : barriers(barriers) {}
    CUTE_DEVICE int next(int tile, int tiles, int* counter) {
      if constexpr (!kDynamic) {
        return following(tile, tiles);
      } else {
        int const slot = turn % 2;
        barrier_wait_free(barriers + kEmpty + 8 * slot, (turn / 2 & 1) ^ 1);
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
          tile = atomicAdd(counter, 1) + int(gridDim.x);
          store_shared(barriers + kSlots + 4 * slot, uint32_t(tile));
          barrier_arrive(barriers + kFull + 8 * slot);
        }
        ++turn;
        return __shfl_sync(~0u, tile, 0);
      }
    }
  };

  // Each of the other warps.
  struct Consumer {
    uint32_t barriers; int turn = 0;
    CUTE_DEVICE explicit Consumer(uint32_t barriers) : barriers(barriers) {}
    CUTE_DEVICE int next(int tile, int tiles) {
      if constexpr (!kDynamic) {
        return following(tile, tiles);
      } else {
        int const slot = turn % 2;
        barrier_wait(barriers + kFull + 8 * slot, turn / 2 & 1);
        tile = *static_cast<int volatile*>(shared_pointer(barriers + kSlots + 4 * slot));
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(barriers + kEmpty + 8 * slot);
        ++turn;
        return __shfl_sync(~0u, tile, 0);
      }
    }
  };
};

}  // namespace vidrial
