// Host bodies of what vidrial/arch/mbarrier.cuh says in PTX on the device.
#pragma once
#include <vidrial/host/runtime.h>

namespace vidrial {

VIDRIAL_INLINE void barrier_init(uint32_t barrier, uint32_t count, char const* name, int index = 0) { host::barrier_init(barrier, count, name, index); }
VIDRIAL_INLINE void barrier_init_fence() {}
VIDRIAL_INLINE void barrier_arrive(uint32_t barrier) { host::barrier_arrive(barrier, 0); }
VIDRIAL_INLINE void barrier_expect(uint32_t barrier, uint32_t bytes) { host::barrier_arrive(barrier, bytes); }
VIDRIAL_INLINE void barrier_wait(uint32_t barrier, uint32_t parity) { host::barrier_wait(barrier, parity, false); }
VIDRIAL_INLINE void barrier_wait_free(uint32_t barrier, uint32_t parity) { host::barrier_wait(barrier, parity, true); }
VIDRIAL_INLINE void named_sync(int id, int threads) { host::named_barrier(host::Named::Sync, id, threads, false); }
VIDRIAL_INLINE void named_arrive(int id, int threads) { host::named_barrier(host::Named::Arrive, id, threads, false); }
VIDRIAL_INLINE bool named_any(int id, int threads, bool mine) { return host::named_barrier(host::Named::Any, id, threads, mine); }
template <int N> VIDRIAL_INLINE void registers_increase() { host::reallocate_registers(N, true); }
template <int N> VIDRIAL_INLINE void registers_decrease() { host::reallocate_registers(N, false); }
VIDRIAL_INLINE void name_role(char const* name, int ctas = 1) { host::name_role(name, ctas); }

}  // namespace vidrial
