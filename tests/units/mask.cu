// Every key of every row, and the blocks of keys that rules say bands of rows see: [from, to), of which [whole_from, whole_to) as a whole.
#include <vidrial/collective/mask.cuh>

struct Args { int* allowed; int* blocks; int rows, keys; };

template <class Rule>
CUTE_DEVICE void show(Args const& args, int index, Rule const& rule) {
  for (int i = threadIdx.x; i < args.rows * args.keys; i += 32) args.allowed[index * args.rows * args.keys + i] = rule.allows(i / args.keys, i % args.keys);
  for (int band = threadIdx.x; band < args.rows / ROWS; band += 32) {
    vidrial::KeyBlocks<KEYS> const found(rule, band * ROWS, band * ROWS + ROWS - 1);
    int const bounds[4] = {found.from, found.whole_from, found.whole_to, found.to};
    for (int b = 0; b < 4; ++b) args.blocks[(index * (args.rows / ROWS) + band) * 4 + b] = bounds[b];
  }
}

extern "C" __global__ void __launch_bounds__(32) unit(__grid_constant__ Args const args) {
  using namespace vidrial;
  show(args, 0, Causal{});
  show(args, 1, Window{37});
  show(args, 2, Tail{args.keys - 5});
  show(args, 3, Both<Window, Tail>{Window{20}, Tail{args.keys - 21}});
}
