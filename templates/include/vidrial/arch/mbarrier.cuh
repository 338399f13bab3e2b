// Barriers of shared memory (mbarrier), named barriers and the reallocation of registers: what a warp-specialised kernel says only in PTX.
#pragma once
#ifndef __CUDACC_RTC__
#include <vidrial/host/hopper.h>
#else

namespace vidrial {

// A barrier at a shared-memory address: a phase completes once `count` arrivals and all bytes that were expected have come.
// The name is for the host target's messages.
CUTE_DEVICE void barrier_init(uint32_t barrier, uint32_t count, char const*, int = 0) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
// What this thread has initialised is seen by TMA; __syncthreads comes after it.
CUTE_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
CUTE_DEVICE void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory"); }
// An arrival that announces bytes which TMA or a bulk copy will bring.
CUTE_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity, the first one has 0, has completed.
CUTE_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile("{.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
               :: "r"(barrier), "r"(parity) : "memory");
}
// The same where the phase before the first one, parity 1, counts as completed: what is waited for is free at first.
CUTE_DEVICE void barrier_wait_free(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }

// Named barriers, ids 1 to 15: whole warps, `threads` of them together. `named_any`: whether one of the threads says so.
CUTE_DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
CUTE_DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
CUTE_DEVICE bool named_any(int id, int threads, bool mine) {
  int r;
  asm volatile("{.reg .pred p, q; setp.ne.s32 p, %3, 0; bar.red.or.pred q, %1, %2, p; selp.s32 %0, 1, 0, q;}"
               : "=r"(r) : "r"(id), "r"(threads), "r"(int(mine)) : "memory");
  return r;
}

// Registers per thread from here on, by all four warps of a warpgroup; an increase waits until others have given theirs back.
template <int N> CUTE_DEVICE void registers_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> CUTE_DEVICE void registers_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
// What the host target calls this thread's warp, in a kernel of which an SM holds `ctas` CTAs at once.
CUTE_DEVICE void name_role(char const*, int ctas = 1) {}

}  // namespace vidrial
#endif
