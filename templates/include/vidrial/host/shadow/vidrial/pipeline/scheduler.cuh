// Vidrial's own header of this name, whose draws the runtime deals out: blocks run one after another here, and the first would get all tiles.
#pragma once
#include <vidrial/pipeline/tma_ring.cuh>
#include <vidrial/tile/smem.cuh>

// NOTE: `tile` and `tiles` are those of Scheduler::Producer::next, which adds as many tiles as there are blocks.
#define atomicAdd(counter, one) vidrial::host::draw_tile(atomicAdd(counter, one), counter, tile, tiles) - int(gridDim.x)
#include_next <vidrial/pipeline/scheduler.cuh>
#undef atomicAdd
