// One box, or one box per block of columns, by TMA: out[row][column] is the tile at (row, column, outer...).
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/pipeline/tma_ring.cuh>
#include <vidrial/tile/tma.cuh>

struct Args { vidrial::TensorMap map; T const* source; T* out; int row, column, head, batch; };

extern "C" __global__ void __launch_bounds__(128) unit(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  uint32_t const smem = vidrial::shared_address(raw), barriers = smem + kBarriers;
  if (threadIdx.x == 0) {
    vidrial::tma_prefetch(args.map);
    Bars::init(barriers);
    vidrial::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Bars::full::expect(barriers, Box::kBytes);
#if RAGGED
    Box::load_ragged(args.map, Bars::full::address(barriers), smem, vidrial::kEvictNormal, RAGGED, args.batch, args.row, args.column, args.head);
#elif OUTER == 2
    Box::load(args.map, Bars::full::address(barriers), smem, vidrial::kEvictFirst, args.row, args.column, args.head, args.batch);
#elif OUTER == 1
    Box::load(args.map, Bars::full::address(barriers), smem, vidrial::kEvictLast, args.row, args.column, args.head);
#else
    Box::load(args.map, Bars::full::address(barriers), smem, vidrial::kEvictNormal, args.row, args.column);
#endif
  }
  Bars::full::wait(barriers, 0);
  for (int i = threadIdx.x; i < kRows * kColumns; i += 128)
    args.out[i] = *static_cast<T*>(vidrial::shared_pointer(smem + Tile::offset(i / kColumns, i % kColumns)));
}
