// Stages of shared memory that one warp fills by TMA and other warps read, and other barriers of a warp-specialised kernel
// (vidrial.layout.barriers). `Full`, `Empty`, `At`: where their barriers lie in the region of barriers, whose address the objects are given.
//
//   producer warp:  Tiles::Bars::k::Producer ring(barriers);          consumers:  Tiles::Bars::k::Consumer ring(barriers);
//                   for (...)                                                     for (...) {
//                     ring.next([&](int stage, uint32_t barrier) {                  int const stage = ring.next();
//                       Tiles::BoxK::load(args.k, barrier, ...);                    ... read it ...
//                     });                                                           ring.release();
//                                                                                 }
#pragma once
#include <vidrial/arch/tma.cuh>

namespace vidrial {

template <int Count>
CUTE_DEVICE void init_barriers(uint32_t first, uint32_t arrivals, char const* name) {
  CUTE_UNROLL
  for (int i = 0; i < Count; ++i) barrier_init(first + 8 * i, arrivals, name, i);
}

// Each stage is full once its `Bytes` have come, and empty once each of `Consumers` warps has released it.
template <int Stages, int Bytes, int Consumers, int Full, int Empty>
struct TmaRing {
  static constexpr int kStages = Stages, kBytes = Bytes;
  CUTE_DEVICE static void init(uint32_t barriers, char const* full, char const* empty) {
    init_barriers<Stages>(barriers + Full, 1, full);
    init_barriers<Stages>(barriers + Empty, Consumers, empty);
  }

  // One whole warp.
  struct Producer {
    uint32_t barriers, parity = 1;
    int stage = 0;
    CUTE_DEVICE explicit Producer(uint32_t barriers) : barriers(barriers) {}
    // Until the next stage is free; its index.
    CUTE_DEVICE int acquire() {
      barrier_wait_free(barriers + Empty + 8 * stage, parity);
      // NOTE: no lane fills the stage before all have seen it free, or one could miss that.
      __syncwarp();
      return stage;
    }
    // Fills the next stage, once it is free: `copy(stage, barrier)` by one lane issues copies of `Bytes` together, told to that barrier.
    template <class Copy>
    CUTE_DEVICE void next(Copy&& copy) {
      acquire();
      if (threadIdx.x % 32 == 0) {
        uint32_t const full = barriers + Full + 8 * stage;
        barrier_expect(full, Bytes);
        copy(stage, full);
      }
      if (++stage == Stages) { stage = 0; parity ^= 1; }
    }
  };

  // Each of the warps that read.
  struct Consumer {
    uint32_t barriers, parity = 0;
    int stage = 0, oldest = 0;
    CUTE_DEVICE explicit Consumer(uint32_t barriers) : barriers(barriers) {}
    // Until the next stage has landed; its index.
    CUTE_DEVICE int next() {
      int const full = stage;
      barrier_wait(barriers + Full + 8 * full, parity);
      if (++stage == Stages) { stage = 0; parity ^= 1; }
      return full;
    }
    // The oldest stage that was waited for: this warp reads it no more, nor does a product that it has issued.
    CUTE_DEVICE void release() {
      __syncwarp();
      if (threadIdx.x % 32 == 0) barrier_arrive(barriers + Empty + 8 * oldest);
      oldest = oldest + 1 == Stages ? 0 : oldest + 1;
    }
  };
};

// `Count` barriers of `Arrivals` each.
template <int Count, int Arrivals, int At>
struct Barrier {
  CUTE_DEVICE static void init(uint32_t barriers, char const* name) { init_barriers<Count>(barriers + At, Arrivals, name); }
  CUTE_DEVICE static uint32_t address(uint32_t barriers, int i = 0) { return barriers + At + 8 * i; }
  CUTE_DEVICE static void arrive(uint32_t barriers, int i = 0) { barrier_arrive(address(barriers, i)); }
  CUTE_DEVICE static void expect(uint32_t barriers, uint32_t bytes, int i = 0) { barrier_expect(address(barriers, i), bytes); }
  CUTE_DEVICE static void wait(uint32_t barriers, uint32_t parity, int i = 0) { barrier_wait(address(barriers, i), parity); }
  CUTE_DEVICE static void wait_free(uint32_t barriers, uint32_t parity, int i = 0) { barrier_wait_free(address(barriers, i), parity); }
};

// Named barriers `First`, `First + 1`, ... of `Threads` threads each.
template <int First, int Count, int Threads>
struct NamedBarrier {
  CUTE_DEVICE static void sync(int i = 0) { named_sync(First + i, Threads); }
  CUTE_DEVICE static void arrive(int i = 0) { named_arrive(First + i, Threads); }
  CUTE_DEVICE static bool any(bool mine, int i = 0) { return named_any(First + i, Threads, mine); }
};

// The first warpgroups of a CTA produce, the others consume. Registers per thread of each; 0: as many as the launch gave.
template <int Producers, int Consumers, int ProducerRegisters, int ConsumerRegisters, int Ctas = 1>
struct Roles {
  static constexpr int kThreads = 128 * (Producers + Consumers), kConsumers = Consumers;
  // NOTE: through a shuffle, so that the compiler knows it to be uniform.
  CUTE_DEVICE static int warp() { return __shfl_sync(~0u, int(threadIdx.x) / 32, 0); }
  CUTE_DEVICE static bool produces(int warp) { return warp < 4 * Producers; }
  // Thread among all consumers, and which of their warpgroups it belongs to.
  CUTE_DEVICE static int consumer_thread() { return int(threadIdx.x) - 128 * Producers; }
  CUTE_DEVICE static int consumer_group(int warp) { return warp / 4 - Producers; }
  CUTE_DEVICE static void become_producer() {
    name_role("producer", Ctas);
    if constexpr (ProducerRegisters > 0) registers_decrease<ProducerRegisters>();
  }
  CUTE_DEVICE static void become_consumer() {
    name_role("consumer", Ctas);
    if constexpr (ConsumerRegisters > 0) registers_increase<ConsumerRegisters>();
  }
};

}  // namespace vidrial
