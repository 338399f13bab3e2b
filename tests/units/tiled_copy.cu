// A tile from global memory into the second of two stages, of which `rows` rows and `columns` columns exist; then all of it, in order.
#include <vidrial/tile/copy.cuh>
using T = Tile::T;

struct Args { T const* source; T* target; int stride, rows, columns; };

extern "C" __global__ void __launch_bounds__(THREADS) unit(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  uint32_t const stage = vidrial::shared_address(raw) + Tile::kBytes;
  Copy const copy(args.source, args.stride, stage - Tile::kBytes, threadIdx.x);
  if (args.columns == COLUMNS && args.rows == ROWS) copy.full(Tile::kBytes);
  else if (args.columns == COLUMNS) copy(Tile::kBytes, args.rows);
  else copy(Tile::kBytes, args.rows, args.columns);
  cute::cp_async_fence();
  cute::cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS)
    args.target[i] = *static_cast<T const*>(vidrial::shared_pointer(stage + Tile::offset(i / COLUMNS, i % COLUMNS)));
}
