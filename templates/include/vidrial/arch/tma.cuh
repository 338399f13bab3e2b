// TMA and bulk copies: one thread asks, the hardware moves a box or a row of bytes between global and shared memory and tells a barrier.
#pragma once
#include <vidrial/arch/mbarrier.cuh>

namespace vidrial {

// A tensor in global memory and the box that is taken from it, as the driver encodes it. A kernel takes it by value
// (`vd.Arguments(a="TensorMap")`): its address is that of a __grid_constant__ parameter.
struct alignas(64) TensorMap { char bytes[128]; };

// What L2 should do with the lines that a copy brings.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull, kEvictFirst = 0x12f0000000000000ull, kEvictLast = 0x14f0000000000000ull;

}  // namespace vidrial

#ifndef __CUDACC_RTC__
#include <vidrial/host/hopper_tma.h>
#else

namespace vidrial {

CUTE_DEVICE void tma_prefetch(TensorMap const& map) { asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory"); }

// The box at these coordinates, innermost first, into shared memory; what lies outside of the tensor becomes zero. All its bytes are told to
// the barrier.
CUTE_DEVICE void tma_load(TensorMap const& map, uint32_t barrier, uint32_t target, uint64_t hint, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;"
               :: "r"(target), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "l"(hint) : "memory");
}
CUTE_DEVICE void tma_load(TensorMap const& map, uint32_t barrier, uint32_t target, uint64_t hint, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;"
               :: "r"(target), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(hint) : "memory");
}
CUTE_DEVICE void tma_load(TensorMap const& map, uint32_t barrier, uint32_t target, uint64_t hint, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
               :: "r"(target), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint) : "memory");
}
CUTE_DEVICE void tma_load(TensorMap const& map, uint32_t barrier, uint32_t target, uint64_t hint, int c0, int c1, int c2, int c3, int c4) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;"
               :: "r"(target), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(hint) : "memory");
}

// `bytes` that lie one behind the other, a multiple of 16, as are both addresses.
CUTE_DEVICE void bulk_load(uint32_t barrier, uint32_t target, void const* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(target), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}
CUTE_DEVICE void bulk_store(void* target, uint32_t source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" :: "l"(target), "r"(source), "r"(bytes) : "memory");
}
CUTE_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the last `Groups` of this thread's groups of stores have read their shared memory.
template <int Groups>
CUTE_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(Groups) : "memory"); }

}  // namespace vidrial
#endif
