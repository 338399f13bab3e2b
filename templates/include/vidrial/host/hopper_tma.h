// Host bodies of what vidrial/arch/tma.cuh says in PTX on the device. A TensorMap is here a host::TensorMap, which vidrial.host packs.
#pragma once
#include <vidrial/host/runtime.h>

namespace vidrial {

VIDRIAL_INLINE void tma_prefetch(TensorMap const&) {}
template <class... C>
VIDRIAL_INLINE void tma_load(TensorMap const& map, uint32_t barrier, uint32_t target, uint64_t, C... c) {
  int const coordinates[] = {int(c)...};
  host::tma_load(map.bytes, barrier, target, int(sizeof...(C)), coordinates);
}
VIDRIAL_INLINE void bulk_load(uint32_t barrier, uint32_t target, void const* source, uint32_t bytes) { host::bulk_load(barrier, target, source, bytes); }
VIDRIAL_INLINE void bulk_store(void* target, uint32_t source, uint32_t bytes) { host::bulk_store(target, source, bytes); }
VIDRIAL_INLINE void bulk_commit() { host::bulk_commit(); }
template <int Groups>
VIDRIAL_INLINE void bulk_wait() { host::bulk_wait(Groups); }

}  // namespace vidrial
