// What is counted, object by object, and which bytes of global memory a launch touches.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>
#include <vidrial/host/fiber.h>

namespace vidrial::host {

// NOTE: vidrial.events.Counts has the same fields in the same order.
struct Counts {
  int64_t mma, wgmma, ldmatrix, ldmatrix_conflicts, shared_loads, shared_load_conflicts, copy_calls, cp_async_requests, cp_async_sectors, cp_async_bytes,
      bulk_copies, bulk_bytes;
};

// Types of tiled objects, each once; the first one, null, is none of them.
inline std::vector<void const*> identities{nullptr};
inline std::vector<Counts> counts{{}};

inline size_t index_of(void const* identity) {
  size_t const found = size_t(std::find(identities.begin(), identities.end(), identity) - identities.begin());
  return found < identities.size() ? found : 0;
}
inline Counts& counts_of(void const* identity) { return counts[index_of(identity)]; }
// Of the object that the running thread is in.
inline Counts& counted() { return counts_of(fibers[size_t(current)].object); }

void const* enter_object(void const* identity) { return std::exchange(fibers[size_t(current)].object, identity); }
bool hold_operands(bool held) { return std::exchange(fibers[size_t(current)].holds_operands, held); }
bool holds_operands() { return fibers[size_t(current)].holds_operands; }
void count_copy() { ++counted().copy_calls; }

// One thread's part of a warp-wide access to memory: equal `object`, `place` and `turn` (how often the thread came there) make up one.
struct Access { void const *object, *place; unsigned turn, lane; uintptr_t address; };
struct Accesses {
  std::vector<std::vector<Access>> threads;
  void begin() { threads.assign(size_t(thread_count), {}); }
  void add(void const* place, uintptr_t address) {
    auto& mine = threads[size_t(current)];
    void const* const object = fibers[size_t(current)].object;
    unsigned turn = 0;
    for (auto a = mine.rbegin(); a != mine.rend(); ++a)
      if (a->place == place && a->object == object) { turn = a->turn + 1; break; }
    mine.push_back({object, place, turn, unsigned(lane()), address});
  }
  // `visit(first, last)` for each access of a warp, its threads in the order of their lanes.
  template <class Visit>
  void for_each_request(Visit visit) const {
    std::vector<Access> warp;
    auto const request = [](Access const& a) { return std::tie(a.object, a.place, a.turn); };
    for (size_t first = 0; first < threads.size(); first += 32) {
      warp.clear();
      for (size_t t = first; t < std::min(first + 32, threads.size()); ++t) warp.insert(warp.end(), threads[t].begin(), threads[t].end());
      std::stable_sort(warp.begin(), warp.end(), [&](Access const& a, Access const& b) { return request(a) < request(b); });
      for (size_t i = 0, j; i < warp.size(); i = j) {
        for (j = i; j < warp.size() && request(warp[j]) == request(warp[i]);) ++j;
        visit(&warp[i], &warp[0] + j);
      }
    }
  }
};
inline Accesses global_copies, shared_loads;

// Passes over the banks beyond one by up to 8 threads of 16 bytes: addresses in the same 4 banks that are not the same.
inline int bank_conflicts(uintptr_t const* address, int count) {
  int worst = 1;
  for (int r = 0; r < count; ++r) {
    uintptr_t const mine = address[r] / 16;
    int together = 0;
    for (int s = 0; s <= r; ++s) {
      uintptr_t const other = address[s] / 16;
      bool const repeated = std::any_of(address, address + s, [&](uintptr_t x) { return x / 16 == other; });
      together += other % 8 == mine % 8 && !repeated;
    }
    worst = std::max(worst, together);
  }
  return worst - 1;
}

// NOTE: 16 bytes by each thread, eight of them at once.
void count_shared_load(uint32_t address) { shared_loads.add(__builtin_return_address(0), address); }

inline void begin_counts() {
  global_copies.begin();
  shared_loads.begin();
}

// Of the CTA that has ended: cp.async's requests with their 32-byte sectors, loads from shared memory with their conflicts.
inline void end_counts() {
  global_copies.for_each_request([](Access const* first, Access const* last) {
    std::vector<uintptr_t> sectors;
    for (Access const* a = first; a != last; ++a) if (a->address) sectors.push_back(a->address / 32);
    if (sectors.empty()) return;
    std::sort(sectors.begin(), sectors.end());
    Counts& c = counts_of(first->object);
    ++c.cp_async_requests;
    c.cp_async_sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  });
  shared_loads.for_each_request([](Access const* first, Access const* last) {
    Counts& c = counts_of(first->object);
    ++c.shared_loads;
    for (unsigned phase = 0; phase < 4; ++phase) {
      uintptr_t address[8];
      int n = 0;
      for (Access const* a = first; a != last; ++a) if (a->lane / 8 == phase) address[n++] = a->address;
      c.shared_load_conflicts += bank_conflicts(address, n);
    }
  });
}

// An array of the launch, and of each of its 32-byte sectors whether the launch has read it before it wrote it, and whether it wrote it.
struct Touched {
  enum : unsigned char { kRead = 1, kWritten = 2 };
  char const* data;
  uint64_t bytes;
  std::vector<unsigned char> sectors;
  Touched(char const* data, uint64_t bytes) : data(data), bytes(bytes), sectors(bytes ? place(data + bytes - 1) + 1 : 0) {}
  size_t place(char const* p) const { return uintptr_t(p) / 32 - uintptr_t(data) / 32; }
};
inline std::vector<Touched> touched;

inline void touch(void const* address, size_t bytes, bool write) {
  char const* const p = static_cast<char const*>(address);
  for (Touched& t : touched) {
    if (p < t.data || p >= t.data + t.bytes) continue;
    for (size_t s = t.place(p); s <= t.place(p + bytes - 1) && s < t.sectors.size(); ++s)
      t.sectors[s] |= write ? Touched::kWritten : t.sectors[s] & Touched::kWritten ? 0 : Touched::kRead;
    return;
  }
}

}  // namespace vidrial::host

// What the compiler calls before each access to memory, if the kernel is compiled so (vidrial.host.compiler, `accesses`).
#if VIDRIAL_ACCESSES
#define VIDRIAL_TOUCH(bytes)                                                                                       \
  extern "C" void __asan_load##bytes##_noabort(void* p) { vidrial::host::touch(p, bytes, false); }                 \
  extern "C" void __asan_store##bytes##_noabort(void* p) { vidrial::host::touch(p, bytes, true); }
VIDRIAL_TOUCH(1)
VIDRIAL_TOUCH(2)
VIDRIAL_TOUCH(4)
VIDRIAL_TOUCH(8)
VIDRIAL_TOUCH(16)
#undef VIDRIAL_TOUCH
extern "C" void __asan_loadN_noabort(void* p, size_t bytes) { vidrial::host::touch(p, bytes, false); }
extern "C" void __asan_storeN_noabort(void* p, size_t bytes) { vidrial::host::touch(p, bytes, true); }
extern "C" void __asan_handle_no_return() {}
extern "C" void __asan_before_dynamic_init(void*) {}
extern "C" void __asan_after_dynamic_init() {}
#endif
