// wgmma: the matrix instruction of a warpgroup. It runs on by itself from its issue to the wait that retires its group.
#pragma once
#ifndef __CUDACC_RTC__
#include <vidrial/host/wgmma_atom.h>
#else

namespace vidrial {

// C (64 x N) += A (64 x 16) B by one instruction, `c` in N / 8 blocks of 8 columns, A in registers or, as B, by a descriptor of shared memory;
// with `accumulate` 0, C = A B. TransposedB: rows of B in shared memory run along n.
// NOTE: the asm of an N names each of its registers: a source defines the atoms that it uses (MmaAtom.definition in vidrial.layout.atoms).
template <int N, class Element, bool SharedA, bool TransposedB> struct Wgmma;

// Registers and shared memory that were written before are what the next wgmma reads.
CUTE_DEVICE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CUTE_DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the last `Groups` groups still run.
template <int Groups>
CUTE_DEVICE void warpgroup_wait() {
  static_assert(0 <= Groups && Groups <= 7, "warpgroup_wait<N>: N is 0 to 7");
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(Groups) : "memory");
}

}  // namespace vidrial
#endif
