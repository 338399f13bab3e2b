// The CTA's shared memory: the dynamic part, exactly as many bytes as asked for, and the static arrays in their section.
#pragma once
#include <vidrial/host/counts.h>

namespace vidrial::host {

inline constexpr size_t kGuardBytes = 64 << 10, kReservedBytes = size_t(1) << 33;
inline constexpr int kGuardByte = 0x5a, kPoisonByte = 0xff;
char* shared_base = nullptr;
size_t shared_bytes = 0;

// Bytes of the dynamic part that belong to no region: between two of them, so that an overflow from one does not pass for the next.
struct Gap { uint64_t offset, bytes; };
inline std::vector<Gap> gaps;

// Behind the shared memory lie 64 KB of guard, then addresses that fault, so that no 32-bit address reaches anything else.
inline void allocate_shared(size_t bytes) {
  void* const memory = mmap(nullptr, kReservedBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  size_t const usable = (bytes + kGuardBytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  if (memory == MAP_FAILED || mprotect(memory, usable, PROT_READ | PROT_WRITE)) refuse("no memory for %zu bytes of shared memory", bytes);
  shared_base = static_cast<char*>(memory);
  shared_bytes = bytes;
  memset(shared_base + bytes, kGuardByte, usable - bytes);
  poison(shared_base + bytes, usable - bytes);
}

// NaN everywhere, as a CTA finds it: what is read before it is written shows.
// NOTE: a loop, not memset: between static arrays lie bytes that AddressSanitizer forbids to library functions.
inline void poison_shared() {
  for (Gap const& g : gaps) unpoison(shared_base + g.offset, g.bytes);
  memset(shared_base, kPoisonByte, shared_bytes);
  for (Gap const& g : gaps) {
    memset(shared_base + g.offset, kGuardByte, g.bytes);
    poison(shared_base + g.offset, g.bytes);
  }
  for (char volatile* p = __start_vidrial_shared; p < __stop_vidrial_shared; ++p) *p = char(kPoisonByte);
}

// The first byte that the CTA wrote in a gap, then as if the gap had never been one.
inline void check_gap(Gap const& g) {
  char* const first = shared_base + g.offset;
  unpoison(first, g.bytes);
  for (size_t i = 0; i < g.bytes; ++i)
    if (first[i] != kGuardByte) refuse("block (%u, %u, %u): shared memory was written %zu bytes past the end of a region, at offset %zu, where none lies", blockIdx.x, blockIdx.y, blockIdx.z, i, size_t(g.offset) + i);
  memset(first, kPoisonByte, g.bytes);
}

inline void check_shared() {
  for (Gap const& g : gaps) check_gap(g);
  size_t high = shared_bytes;
  while (high && static_cast<unsigned char>(shared_base[high - 1]) == kPoisonByte) --high;
  stats.shared_memory_high_water = std::max(stats.shared_memory_high_water, int64_t(high));
#if !VIDRIAL_ASAN
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (shared_base[shared_bytes + i] != kGuardByte) refuse("block (%u, %u, %u): shared memory was written %zu bytes past its end (the launch asked for %zu bytes)", blockIdx.x, blockIdx.y, blockIdx.z, i, shared_bytes);
#endif
}

inline bool in_shared(void const* p, int bytes) {
  char const* const first = static_cast<char const*>(p);
  for (Gap const& g : gaps)
    if (first < shared_base + g.offset + g.bytes && first + bytes > shared_base + g.offset) return false;
  return (first >= shared_base && first + bytes <= shared_base + shared_bytes) || (first >= __start_vidrial_shared && first + bytes <= __stop_vidrial_shared);
}

}  // namespace vidrial::host
