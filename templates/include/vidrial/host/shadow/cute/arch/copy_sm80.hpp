// cp.async; see mma_sm80.hpp beside this file.
#pragma once
#include_next <cute/arch/copy_sm80.hpp>
#include <vidrial/host/runtime.h>

namespace cute {

template <class S, class D = S>
struct HostCopyAsync {
  using SRegisters = S[1]; using DRegisters = D[1];
  static_assert(sizeof(S) == sizeof(D) && (sizeof(S) == 4 || sizeof(S) == 8 || sizeof(S) == 16), "cp.async copies 4, 8 or 16 bytes");
  VIDRIAL_INLINE static void copy(S const& source, D& target) { vidrial::host::cp_async(&target, &source, sizeof(S), sizeof(S)); }
};
template <class S, class D = S>
struct HostCopyAsyncZeroFill {
  using SRegisters = S[1]; using DRegisters = D[1];
  static_assert(sizeof(S) == sizeof(D) && (sizeof(S) == 4 || sizeof(S) == 8 || sizeof(S) == 16), "cp.async copies 4, 8 or 16 bytes");
  VIDRIAL_INLINE static void copy(S const& source, D& target, bool wanted) { vidrial::host::cp_async(&target, &source, sizeof(S), wanted ? sizeof(S) : 0); }
};
template <class S, class D = S>
struct HostCopyAsync16 : HostCopyAsync<S, D> { static_assert(sizeof(S) == 16, "past L1, cp.async copies 16 bytes"); };
template <class S, class D = S>
struct HostCopyAsyncZeroFill16 : HostCopyAsyncZeroFill<S, D> { static_assert(sizeof(S) == 16, "past L1, cp.async copies 16 bytes"); };

VIDRIAL_INLINE void host_cp_async_fence() { vidrial::host::cp_async_commit(); }
template <int N>
VIDRIAL_INLINE void host_cp_async_wait() {
  if constexpr (N == 0) vidrial::host::cp_async_wait_all();
  else vidrial::host::cp_async_wait_group(N);
}
template <int N>
VIDRIAL_INLINE void host_cp_async_wait(Int<N>) { host_cp_async_wait<N>(); }

}  // namespace cute

#define SM80_CP_ASYNC_CACHEALWAYS       HostCopyAsync
#define SM80_CP_ASYNC_CACHEGLOBAL       HostCopyAsync16
#define SM80_CP_ASYNC_CACHEALWAYS_ZFILL HostCopyAsyncZeroFill
#define SM80_CP_ASYNC_CACHEGLOBAL_ZFILL HostCopyAsyncZeroFill16
#define cp_async_fence                  host_cp_async_fence
#define cp_async_wait                   host_cp_async_wait
