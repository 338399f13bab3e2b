// Which tile a CTA works on next (vidrial.layout.schedule, which has the same order in Python).
#pragma once
#include <vidrial/arch/mbarrier.cuh>
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

enum class Schedule { One, Static };

// One: a CTA per tile. Static: the CTAs that there are take turns.
template <Schedule Kind, bool Heavy>
struct Scheduler {
  CUTE_DEVICE static int first() { return blockIdx.x; }
  // The tile after this one; as many as there are, or more, if there is none.
  CUTE_DEVICE static int next(int tile, int tiles) { return Kind == Schedule::One ? tiles : tile + int(gridDim.x); }
  CUTE_DEVICE static TilePlace place(int tile, int rows, int columns, int groups) { return tile_place<Heavy>(tile, rows, columns, groups); }
};

// Dynamic: CTAs draw tiles from a counter in global memory. One warp draws and hands them on to `Consumers` warps, two at most ahead.
// NOTE: the counter is 0 before the launch, and again after it. It belongs to one launch: two streams must not share it.
template <bool Heavy, int Consumers, int Full, int Empty, int Slots>
struct DynamicScheduler {
  CUTE_DEVICE static void init(uint32_t barriers, char const* full, char const* empty) {
    CUTE_UNROLL
    for (int i = 0; i < 2; ++i) {
      barrier_init(barriers + Full + 8 * i, 1, full, i);
      barrier_init(barriers + Empty + 8 * i, Consumers, empty, i);
    }
  }
  CUTE_DEVICE static int first() { return blockIdx.x; }
  CUTE_DEVICE static TilePlace place(int tile, int rows, int columns, int groups) { return tile_place<Heavy>(tile, rows, columns, groups); }

  struct Producer {
    uint32_t barriers; int turn = 0;
    CUTE_DEVICE explicit Producer(uint32_t barriers) : barriers(barriers) {}
    // Draws the next tile; by the whole warp.
    CUTE_DEVICE int next(int* counter, int tiles) {
      int const slot = turn % 2;
      barrier_wait_free(barriers + Empty + 8 * slot, (turn / 2 & 1) ^ 1);
      __syncwarp();
      int tile = 0;
      if (threadIdx.x % 32 == 0) {
        tile = atomicAdd(counter, 1) + int(gridDim.x);
        store_shared(barriers + Slots + 4 * slot, uint32_t(tile));
        barrier_arrive(barriers + Full + 8 * slot);
        // The last draw of all leaves the counter as it was.
        if (tile == tiles + int(gridDim.x) - 1) atomicExch(counter, 0);
      }
      ++turn;
      return __shfl_sync(~0u, tile, 0);
    }
  };

  struct Consumer {
    uint32_t barriers; int turn = 0;
    CUTE_DEVICE explicit Consumer(uint32_t barriers) : barriers(barriers) {}
    CUTE_DEVICE int next() {
      int const slot = turn % 2;
      barrier_wait(barriers + Full + 8 * slot, turn / 2 & 1);
      int const tile = *static_cast<int volatile*>(shared_pointer(barriers + Slots + 4 * slot));
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(barriers + Empty + 8 * slot);
      ++turn;
      return __shfl_sync(~0u, tile, 0);
    }
  };
};

}  // namespace vidrial
