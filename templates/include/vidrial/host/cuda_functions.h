// The functions of CUDA C++ that threads use together, under their CUDA names: barriers, shuffles, votes, atomics.
#pragma once
#include <vidrial/host/cta.h>

#define VIDRIAL_SITE char const* file = __builtin_FILE(), int line = __builtin_LINE()

[[gnu::noinline]] VIDRIAL_RUNTIME inline void __syncthreads(VIDRIAL_SITE) { vidrial::host::sync_threads(file, line, __builtin_return_address(0)); }

[[gnu::noinline]] VIDRIAL_RUNTIME inline void __syncwarp(unsigned mask = ~0u) {
  namespace host = vidrial::host;
  void* const key = &host::warp();
  int none = 0;
  host::publish(key);
  host::collective("wait in __syncwarp", mask, __builtin_return_address(0), none, [](int**) {});
  host::observe(key);
}

namespace vidrial::host {

template <class T> struct Exchange { T value, result; int source; };

// `source` is a lane of the warp. What a lane outside of the mask would give is undefined: here it is all ones, NaN as a float.
template <class T>
[[gnu::noinline]] VIDRIAL_RUNTIME T shuffle(unsigned mask, T value, int source) {
  Exchange<T> mine{value, value, source};
  collective("wait in a shuffle", mask, __builtin_return_address(0), mine, [full = mask & warp().full](Exchange<T>** lanes) VIDRIAL_UNWATCHED {
    for (int i = 0; i < 32; ++i) {
      if (!(full >> i & 1)) continue;
      Exchange<T>& x = *lanes[i];
      if (full >> x.source & 1) x.result = lanes[x.source]->value;
      else memset(static_cast<void*>(&x.result), 0xff, sizeof(T));
    }
  });
  return mine.result;
}

[[gnu::noinline]] VIDRIAL_RUNTIME inline unsigned vote(unsigned mask, bool mine) {
  Exchange<unsigned> argument{unsigned(mine), 0, 0};
  collective("wait in a vote", mask, __builtin_return_address(0), argument, [full = mask & warp().full](Exchange<unsigned>** lanes) VIDRIAL_UNWATCHED {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) if (full >> i & 1) all |= lanes[i]->value << i;
    for (int i = 0; i < 32; ++i) if (full >> i & 1) lanes[i]->result = all;
  });
  return argument.result;
}

// The first lane of this lane's segment of `width`.
VIDRIAL_RUNTIME inline int segment(int width) { return lane() & ~(width - 1); }

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

template <class T> inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return vidrial::host::shuffle(mask, value, vidrial::host::segment(width) + (source & (width - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  int const me = vidrial::host::lane(), source = me ^ bits;
  return vidrial::host::shuffle(mask, value, source < vidrial::host::segment(width) + width ? source : me);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int const me = vidrial::host::lane(), source = me + int(delta);
  return vidrial::host::shuffle(mask, value, source < vidrial::host::segment(width) + width ? source : me);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  int const me = vidrial::host::lane(), source = me - int(delta);
  return vidrial::host::shuffle(mask, value, source >= vidrial::host::segment(width) ? source : me);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return vidrial::host::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return vidrial::host::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return vidrial::host::vote(mask, predicate == 0) == 0; }

template <class T> inline T atomicAdd(T* p, T x) { return vidrial::host::atomic_change(p, [x](T old) { return T(old + x); }); }
template <class T> inline T atomicMax(T* p, T x) { return vidrial::host::atomic_change(p, [x](T old) { return old > x ? old : x; }); }
template <class T> inline T atomicMin(T* p, T x) { return vidrial::host::atomic_change(p, [x](T old) { return old < x ? old : x; }); }
template <class T> inline T atomicExch(T* p, T x) { return vidrial::host::atomic_change(p, [x](T) { return x; }); }
template <class T> inline T atomicCAS(T* p, T expected, T x) { return vidrial::host::atomic_change(p, [=](T old) { return old == expected ? x : old; }); }

#undef VIDRIAL_SITE
