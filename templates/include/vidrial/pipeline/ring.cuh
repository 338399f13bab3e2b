// A ring of buffers in shared memory that all threads of the CTA fill by cp.async: while one is read, those behind it are on their way.
//
//   vidrial::Ring<kStages, 1> ring;
//   ring.first(copy);                                    // copy(item, stage): this thread's loads of work item `item` into buffer `stage`;
//   for (int i = 0; i < items; ++i) {                    // none for an item that does not exist. The ring commits them as a group.
//     int const stage = ring.next(copy);                 // item i has landed in buffer `stage`; all threads come here
//     ... read it ...
//   }
#pragma once
#include <vidrial/tile/smem.cuh>

namespace vidrial {

// Read: buffers that may still be read when the next one is handed out: 1, or 2 where wgmma reads on by itself. Ahead: buffers behind the
// one handed out that must have landed, too. Async: readers go by the async proxy, as wgmma does.
template <int Stages, int Read, int Ahead = 0, bool Async = Read == 2>
struct Ring {
  static constexpr int kStages = Stages, kFirst = Stages - Read;       // kFirst: buffers that are filled before the first is handed out
  static_assert(Read >= 1 && Ahead >= 0 && kFirst > Ahead, "the ring has too few stages");
  int item = 0, read = 0, write = kFirst;

  CUTE_DEVICE static constexpr int after(int stage) { return stage + 1 == Stages ? 0 : stage + 1; }

  // Starts the first loads. Unroll: their code once for each buffer.
  template <bool Unroll = false, class Copy>
  CUTE_DEVICE void first(Copy&& copy) {
    _Pragma("unroll (Unroll ? kFirst : 1)")
    for (int s = 0; s < kFirst; ++s) start(copy, s);
  }
  // Until the buffer that comes first has landed, for what is made of it before the loop.
  CUTE_DEVICE void wait_first() const {
    cute::cp_async_wait<kFirst - 1>();
    __syncthreads();
  }
  // The oldest buffer, which has landed as have `Ahead` behind it; the one that nobody reads any more is refilled.
  template <class Copy>
  CUTE_DEVICE int next(Copy&& copy) {
    cute::cp_async_wait<kFirst - 1 - Ahead>();
    if constexpr (Async) fence_async_proxy();
    __syncthreads();
    start(copy, write);
    write = after(write);
    int const stage = read;
    read = after(read);
    return stage;
  }

 private:
  template <class Copy>
  CUTE_DEVICE void start(Copy&& copy, int stage) {
    copy(item, stage);
    ++item;
    cute::cp_async_fence();
  }
};

// Vectors of 16 bytes, one by each of the first `threads` threads.
CUTE_DEVICE void copy_vectors(void const* source, uint32_t target, int thread, int threads) {
  if (thread < threads) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(static_cast<cute::uint128_t const*>(source)[thread], shared_vector(target + thread * 16));
  }
}

}  // namespace vidrial
