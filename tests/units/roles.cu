// One producer warp and two consumer warpgroups. Tiles of 64 rows pass through a ring; warpgroup g adds up its 32 rows of each, times the
// factors of that tile, which a bulk copy brings beside it; a vote and named barriers on the way; a bulk store takes the sums back.
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/pipeline/scheduler.cuh>
#include <vidrial/pipeline/tma_ring.cuh>
#include <vidrial/tile/tma.cuh>

struct Args { vidrial::TensorMap map; T const* source; float const* factors; float* out; int* order; int* counter; int tiles; };

extern "C" __global__ void __launch_bounds__(Roles::kThreads, 1) unit(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  uint32_t const smem = vidrial::shared_address(raw), barriers = smem + kBarriers;
  int const warp = Roles::warp();
  if (threadIdx.x == 0) {
    Bars::init(barriers);
    vidrial::barrier_init_fence();
  }
  __syncthreads();
  if (Roles::produces(warp)) {
    Roles::become_producer();
    if (warp == 0) {
      Bars::ring::Producer ring(barriers);
      Bars::draw::Producer draw(barriers);
      for (int tile = Bars::draw::first(); tile < args.tiles; tile = draw.next(tile, args.tiles, args.counter)) {
        ring.next([&](int stage, uint32_t full) {
          Box::load(args.map, full, smem + stage * Box::kBytes, vidrial::kEvictNormal, tile * 64, 0);
          vidrial::bulk_load(full, smem + kFactors + stage * 256, args.factors + tile * 64, 256);
        });
      }
    }
    return;
  }
  Roles::become_consumer();
  int const t = Roles::consumer_thread(), group = Roles::consumer_group(warp), lane = threadIdx.x % 32;
  Bars::ring::Consumer ring(barriers);
  Bars::draw::Consumer draw(barriers);
  float sum = 0.f;
  int count = 0;
  for (int tile = Bars::draw::first(); tile < args.tiles; tile = draw.next(tile, args.tiles)) {
    int const stage = ring.next();
    // Thread t % 128 has column t % 64 of 16 rows.
    int const column = t % 64, row = group * 32 + t % 128 / 64 * 16;
    float part = 0.f;
    for (int r = row; r < row + 16; ++r) {
      T const x = *static_cast<T*>(vidrial::shared_pointer(smem + stage * Box::kBytes + Tile::offset(r, column)));
      part += float(x) * *static_cast<float*>(vidrial::shared_pointer(smem + kFactors + stage * 256 + 4 * r));
    }
    // Only if one of the warpgroup's values is negative does it count.
    if (Named::vote::any(part < 0.f, group)) sum += part;
    ring.release();
    if (t == 0) args.order[tile] = count;
    ++count;
  }
  // Ping-pong: the second warpgroup adds to what the first one has left.
  float* const sums = static_cast<float*>(vidrial::shared_pointer(smem + kSums));
  if (group == 0) {
    sums[t] = sum;
    Named::turn::arrive();
  } else {
    Named::turn::sync();
    sums[t - 128] += sum;
    vidrial::fence_async_proxy();
    Named::own::sync();
    if (t == 128) {
      vidrial::bulk_store(args.out, smem + kSums, 512);
      vidrial::bulk_commit();
      vidrial::bulk_wait<0>();
    }
  }
}
