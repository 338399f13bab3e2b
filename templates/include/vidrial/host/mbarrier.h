// mbarriers, named barriers and the pool of registers in software. A wait is a fiber's wait; an arrival publishes what its thread did, a
// wait that passed observes it.
#pragma once
#include <deque>
#include <set>
#include <utility>
#include <vidrial/host/wgmma.h>

namespace vidrial::host {

// `pending`: arrivals that the phase still needs; `bytes`: announced, less those that came; `phases`: completed so far. `seen`: for each
// thread one more than the phases that it knew completed when it last passed, 0 before. A sanitizer knows each phase by a key.
struct Mbarrier {
  uint32_t address = 0, count = 0, pending = 0;
  int64_t bytes = 0, announced[2] = {};  // announced: in the phase under way, and in the one before
  uint64_t phases = 0;
  std::string name, waits[2];
  void* copy = nullptr;  // where the last copy for it was issued
  std::vector<uint64_t> seen;
  std::vector<int> waiting;
  char keys[4] = {};
  void* key(uint64_t phase) { return &keys[phase % 4]; }
};
inline std::deque<Mbarrier> mbarriers;
inline constexpr char const* kNoEmptyWait = "the wait for an empty stage is missing, or a stage was released that nobody waited for";
// What stands in the eight bytes of a barrier, so that what overwrites it is found.
inline constexpr uint64_t kBarrierMark = 0xba55ba55ba55ba55ull;

struct NamedBarrier { int threads = 0, arrived = 0; void* meeting = nullptr; bool any = false; std::vector<bool> came; std::vector<std::pair<int, bool*>> waiting; };
inline NamedBarrier named_barriers[16];

// Registers per thread of each warpgroup, what is left of those that the launch took, and who waits for some.
struct RegisterPool { int ctas = 1, launched = 0, left = 0; std::vector<int> of_warpgroup, wanted; };
inline RegisterPool registers;

// A text that lives as long as the process.
inline char const* interned(std::string const& text) {
  static std::set<std::string> texts;
  return texts.insert(text).first->c_str();
}

inline void make_runnable(int thread) { warps[size_t(thread >> 5)].runnable |= 1u << (thread & 31); }

inline void describe_barriers(std::string& text) {
  for (Mbarrier const& b : mbarriers) {
    text += "\n  barrier " + b.name + ": " + std::to_string(b.phases) + " phases completed, " + std::to_string(b.count - b.pending) + " of " + std::to_string(b.count) +
            " arrivals of the next";
    if (b.bytes) text += ", " + std::to_string(std::abs(b.bytes)) + (b.bytes > 0 ? " bytes announced that did not come" : " bytes that nobody announced");
  }
  for (int id = 1; id < 16; ++id) {
    NamedBarrier const& n = named_barriers[id];
    if (n.arrived) text += "\n  named barrier " + std::to_string(id) + ": " + std::to_string(n.arrived) + " of " + std::to_string(n.threads) + " threads came";
  }
  for (size_t g = 0; g < registers.wanted.size(); ++g)
    if (registers.wanted[g])
      text += "\n  registers: warpgroup " + std::to_string(g) + " wants " + std::to_string(registers.wanted[g]) + " per thread, which are " +
              std::to_string((registers.wanted[g] - registers.of_warpgroup[g]) * kGroupThreads) + " more; the CTA has " + std::to_string(registers.left) + " left of " +
              std::to_string(registers.launched * thread_count);
}

// As many registers as an SM can give to each thread of `ctas` CTAs.
inline void fill_pool(int ctas) {
  size_t const groups = size_t(thread_count + kGroupThreads - 1) / kGroupThreads;
  int const launched = std::min(65536 / (thread_count * ctas) / 8 * 8, 256);
  registers = {ctas, launched, 0, std::vector<int>(groups, launched), std::vector<int>(groups, 0)};
}

inline void begin_barriers() {
  mbarriers.clear();
  for (NamedBarrier& n : named_barriers) n = {};
  fill_pool(1);
  describe_state = describe_barriers;
}

inline Mbarrier* find_barrier(uint32_t address) {
  for (Mbarrier& b : mbarriers) if (b.address == address) return &b;
  return nullptr;
}

inline Mbarrier& barrier_at(char const* what, uint32_t address, void* place) {
  Mbarrier* const b = find_barrier(address);
  if (!b) fatal("%s: no barrier was initialised at the shared address 0x%x", what, address);
  Watched const kernel(place);
  uint64_t mark;
  memcpy(&mark, shared_base + address, sizeof mark);
  if (mark != kBarrierMark) fatal("%s: barrier %s at the shared address 0x%x was overwritten", what, b->name.c_str(), address);
  return *b;
}

void barrier_init(uint32_t address, uint32_t count, char const* name, int index) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  std::string const full = std::string(name) + "[" + std::to_string(index) + "]";
  if (address % 8) fatal("barrier_init: %s at the shared address 0x%x, which is not a multiple of 8", full.c_str(), address);
  if (!in_shared(shared_base + address, 8)) fatal("barrier_init: %s at 0x%x, which is not in dynamic shared memory (the launch asked for %zu bytes)", full.c_str(), address, shared_bytes);
  if (!count || count >= 1 << 20) fatal("barrier_init: %s of %u arrivals; accepted are 1 to 1048575", full.c_str(), count);
  if (Mbarrier const* other = find_barrier(address)) fatal("barrier_init: %s at 0x%x is initialised already, as %s", full.c_str(), address, other->name.c_str());
  Mbarrier& b = mbarriers.emplace_back();
  b.address = address, b.count = b.pending = count, b.name = full;
  for (int parity = 0; parity < 2; ++parity) b.waits[parity] = "wait for barrier " + full + ", parity " + std::to_string(parity);
  b.seen.assign(size_t(thread_count), 0);
  Watched const kernel(place);
  memcpy(shared_base + address, &kBarrierMark, sizeof kBarrierMark);
}

// Once everything has come the phase is over, and who waited for it goes on; one of them, -1 if none.
inline int complete_phase(Mbarrier& b) {
  if (b.pending) return -1;
  if (b.bytes < 0) fatal("barrier %s: %lld bytes more came than were announced; the last copy was issued at <place %lx>", b.name.c_str(), (long long)-b.bytes, place(b.copy));
  if (b.bytes > 0) return -1;
  ++b.phases;
  b.announced[1] = std::exchange(b.announced[0], 0);
  b.pending = b.count;
  for (int thread : b.waiting) make_runnable(thread);
  int const woken = b.waiting.empty() ? -1 : b.waiting[0];
  b.waiting.clear();
  return woken;
}

void barrier_arrive(uint32_t address, uint32_t bytes) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  Mbarrier& b = barrier_at("arrival", address, place);
  if (!b.pending) fatal("barrier %s: an arrival more than the %u that it counts in a phase, while its bytes are on their way: %s", b.name.c_str(), b.count, kNoEmptyWait);
  publish(b.key(b.phases));
  b.bytes += bytes, b.announced[0] += bytes;
  --b.pending;
  int const woken = complete_phase(b);
  if (eager && woken >= 0) give_way(woken);
}

// What a copy brought on behalf of phase `b.phases`, and which of that some thread has waited for: host/tma.h.
inline void (*mark_waited)(Mbarrier const&) = [](Mbarrier const&) {};

void barrier_wait(uint32_t address, uint32_t parity, bool free) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  Mbarrier& b = barrier_at("wait", address, place);
  if (parity > 1) fatal("barrier %s: parity %u; accepted are 0 and 1", b.name.c_str(), parity);
  uint64_t const known = b.phases;
  if ((known & 1) == parity) {
    b.waiting.push_back(current);
    wait_here(interned(b.waits[parity]), place);
    if (b.phases != known + 1)
      fatal("barrier %s: %llu phases completed while this thread waited for one; who arrives there must first wait for this thread", b.name.c_str(), (unsigned long long)(b.phases - known));
  }
  if (!b.phases && !free) fatal("barrier %s: no phase of it has completed, and a wait for parity 1 passes at once; the first phase has parity 0", b.name.c_str());
  uint64_t& seen = b.seen[size_t(current)];
  if (seen == b.phases + 1) fatal("barrier %s: this thread has passed its phase of parity %u before; after each turn of a ring the parity changes", b.name.c_str(), parity);
  seen = b.phases + 1;
  if (b.phases) observe(b.key(b.phases - 1));
  mark_waited(b);
}

bool named_barrier(Named what, int id, int threads, bool mine) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  if (id < 1 || id > 15) fatal("named barrier %d: ids are 1 to 15 (0 is __syncthreads)", id);
  if (threads < 32 || threads % 32 || threads > thread_count) fatal("named barrier %d of %d threads: it takes whole warps, at most the CTA's %d threads", id, threads, thread_count);
  NamedBarrier& n = named_barriers[id];
  if (n.arrived && n.threads != threads) fatal("named barrier %d: %d threads came to one of %d threads, this thread to one of %d", id, n.arrived, n.threads, threads);
  if (!n.arrived) n.threads = threads, n.meeting = new_meeting(), n.came.assign(size_t(thread_count), false);
  if (n.came[size_t(current)]) fatal("named barrier %d: this thread has arrived already, and %d of %d have not", id, threads - n.arrived, threads);
  n.came[size_t(current)] = true;
  void* const meeting = n.meeting;
  publish(meeting);
  n.any |= mine;
  bool result = n.any;
  if (++n.arrived == threads) {
    for (auto [thread, answer] : n.waiting) *answer = n.any, make_runnable(thread);
    int const woken = n.waiting.empty() ? -1 : n.waiting[0].first;
    n = {};
    if (eager && woken >= 0) give_way(woken);
  } else if (what != Named::Arrive) {
    n.waiting.push_back({current, &result});
    wait_here(interned((what == Named::Any ? "wait in a vote of named barrier " : "wait in named barrier ") + std::to_string(id)), place);
  }
  if (what != Named::Arrive) observe(meeting);
  return result;
}

// Warpgroups that wait for registers get them, if there are enough.
inline void grant_registers() {
  for (size_t g = 0; g < registers.wanted.size(); ++g) {
    int const more = (registers.wanted[g] - registers.of_warpgroup[g]) * kGroupThreads;
    if (!registers.wanted[g] || more > registers.left) continue;
    registers.left -= more;
    registers.of_warpgroup[g] = registers.wanted[g];
    registers.wanted[g] = 0;
    for (size_t w = 4 * g; w < 4 * g + 4; ++w) warps[w].runnable = warps[w].full;
  }
}

void reallocate_registers(int wanted, bool increase) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  char const* const name = increase ? "registers_increase" : "registers_decrease";
  require_warpgroup(name);
  size_t const group = size_t(current / kGroupThreads);
  if (wanted < 24 || wanted > 256 || wanted % 8) fatal("%s: %d registers per thread; accepted are multiples of 8 from 24 to 256", name, wanted);
  if (int const now = registers.of_warpgroup[group]; increase ? wanted < now : wanted > now) fatal("%s: to %d registers per thread, the warpgroup has %d", name, wanted, now);
  meet_warpgroup(increase ? "wait in registers_increase" : "wait in registers_decrease", place, [group, wanted](int) {
    registers.wanted[group] = wanted;
    grant_registers();
  });
  while (registers.wanted[group]) wait_here(interned("wait for " + std::to_string(wanted) + " registers per thread"), place);
}

void name_role(char const* name, int ctas) {
  warp().role = name;
  if (ctas != registers.ctas) fill_pool(ctas);
}

}  // namespace vidrial::host
