// Items of one word per thread through a ring. Of each, while it is handed out: its own word, that of the one behind it (if it has landed, too)
// and that of the one before it (if it may still be read).
#include <vidrial/pipeline/ring.cuh>

struct Args { int const* source; int* target; int items; };

extern "C" __global__ void __launch_bounds__(64) unit(__grid_constant__ Args const args) {
  VIDRIAL_SHARED_MEMORY(raw);
  int const thread = threadIdx.x;
  uint32_t const smem = vidrial::shared_address(raw);
  auto const copy = [&](int item, int stage) {
    if (item < args.items) vidrial::copy_vectors(args.source + 64 * item, smem + 256 * stage, thread, 16);
  };
  // A word that another thread has copied.
  auto const word = [&](int stage) { return *static_cast<int const*>(vidrial::shared_pointer(smem + 256 * stage + 4 * (63 - thread))); };
  using Ring = vidrial::Ring<STAGES, READ, AHEAD>;
  Ring ring;
  ring.first<UNROLL>(copy);
  ring.wait_first();
  int const first = word(0);
  for (int i = 0; i < args.items; ++i) {
    int const stage = ring.next(copy);
    int sum = word(stage) + (i == 0 ? first : 0);
    if (AHEAD > 0 && i + 1 < args.items) sum += 3 * word(ring.read);
    if (READ > 1 && i > 0) sum += 5 * word(stage == 0 ? STAGES - 1 : stage - 1);
    args.target[64 * i + thread] = sum;
  }
}
