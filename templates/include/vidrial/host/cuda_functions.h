// The functions of CUDA C++ that threads use together, under their CUDA names: barriers, shuffles, votes, atomics.
#pragma once
#include <vidrial/host/runtime.h>

VIDRIAL_INLINE void __syncthreads(char const* file = __builtin_FILE(), int line = __builtin_LINE()) { vidrial::host::sync_threads(file, line); }
VIDRIAL_INLINE void __syncwarp(unsigned mask = ~0u) { vidrial::host::sync_warp(mask); }

namespace vidrial::host {

template <class T>
VIDRIAL_INLINE T shuffle_value(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t carrier = 0;
  memcpy(&carrier, &value, sizeof(T));
  carrier = shuffle(mask, carrier, source);
  memcpy(&value, &carrier, sizeof(T));
  return value;
}

// The first lane of this lane's segment of `width`.
inline int segment(int width) { return lane() & ~(width - 1); }

// An atomic read-modify-write: only ThreadSanitizer would notice a plain one, since there is one OS thread.
template <class T, class Change>
inline T atomic_change(T* address, Change change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T old, wanted;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do wanted = change(old);
  while (!__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace vidrial::host

template <class T> VIDRIAL_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return vidrial::host::shuffle_value(mask, value, vidrial::host::segment(width) + (source & (width - 1)));
}
template <class T> VIDRIAL_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int const me = vidrial::host::lane(), source = me ^ bits;
  return vidrial::host::shuffle_value(mask, value, source < vidrial::host::segment(width) + width ? source : me);
}
template <class T> VIDRIAL_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int const me = vidrial::host::lane(), source = me + int(delta);
  return vidrial::host::shuffle_value(mask, value, source < vidrial::host::segment(width) + width ? source : me);
}
template <class T> VIDRIAL_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int const me = vidrial::host::lane(), source = me - int(delta);
  return vidrial::host::shuffle_value(mask, value, source >= vidrial::host::segment(width) ? source : me);
}
VIDRIAL_INLINE unsigned __ballot_sync(unsigned mask, int predicate) { return vidrial::host::vote(mask, predicate != 0); }
VIDRIAL_INLINE int __any_sync(unsigned mask, int predicate) { return vidrial::host::vote(mask, predicate != 0) != 0; }
VIDRIAL_INLINE int __all_sync(unsigned mask, int predicate) { return vidrial::host::vote(mask, predicate == 0) == 0; }

template <class T> inline T atomicAdd(T* p, T x) { return vidrial::host::atomic_change(p, [x](T old) { return T(old + x); }); }
template <class T> inline T atomicMax(T* p, T x) { return vidrial::host::atomic_change(p, [x](T old) { return old > x ? old : x; }); }
template <class T> inline T atomicMin(T* p, T x) { return vidrial::host::atomic_change(p, [x](T old) { return old < x ? old : x; }); }
template <class T> inline T atomicExch(T* p, T x) { return vidrial::host::atomic_change(p, [x](T) { return x; }); }
template <class T> inline T atomicCAS(T* p, T expected, T x) { return vidrial::host::atomic_change(p, [=](T old) { return old == expected ? x : old; }); }
