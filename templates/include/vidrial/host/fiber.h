// Every CUDA thread of the running CTA is a fiber on one OS thread; it runs until it has to wait for others.
#pragma once
#include <sys/mman.h>
#include <utility>
#include <vector>
#include <vidrial/host/report.h>

// void vidrial_switch(void** save, void* load): store the callee-saved registers on this stack, go on with those on the other.
extern "C" void vidrial_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.hidden vidrial_switch
.globl vidrial_switch
.type vidrial_switch, @function
vidrial_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vidrial_switch, .-vidrial_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.hidden vidrial_switch
.globl vidrial_switch
.type vidrial_switch, %function
vidrial_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size vidrial_switch, .-vidrial_switch
)");
#else
#error "the host target needs a context switch for this processor: add one beside those for x86-64 and aarch64"
#endif

namespace vidrial::host {

// Where a fiber waits: in what, called from where.
struct Wait { char const* what = "has not started"; void const* place = nullptr; };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* race_context = nullptr;
  StackInfo stack_info;
  void const* object = nullptr;  // the tiled object whose instructions the thread is at
  bool holds_operands = false;
  uint3 index{};
  Wait wait;
  bool done = false;
};
// Lanes that came together so far; a free slot has no mask. `role`: what a warp-specialised kernel calls the warp.
struct Slot { unsigned arrived = 0, mask = 0; void* meeting = nullptr; char const* what = ""; void* arguments[32]; };
struct Warp { unsigned runnable = 0, full = 0; char const* role = ""; Slot slots[32]; };

enum class Order : unsigned { Up, Down, Random };

inline constexpr size_t kStackBytes = 256 << 10, kPageBytes = 4096;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Fiber main_fiber;
inline int current = 0, thread_count = 0, live = 0;
inline Order order = Order::Up;
// What else the schedule says (vidrial.host.target): cp.async and wgmma late; whom an arrival wakes runs at once, and TMA lands when it is issued.
inline bool lazy = true, eager = false;
inline unsigned random_state = 1;
inline void (*thread_body)() = nullptr;
// What orders a CTA's threads behind everything before it, and what follows behind them.
inline char cta_begin, cta_end;

// What a sanitizer knows one barrier of one set of threads by. A thread may leave it after others have come to the next one, so
// the two must not share a key.
inline void* new_meeting() {
  static char keys[4096];
  static unsigned next = 0;
  return &keys[next++ % sizeof keys];
}

int lane() { return current & 31; }
inline Warp& warp() { return warps[size_t(current >> 5)]; }

inline void switch_to(Fiber& from, Fiber& to, bool dying = false) {
  ++stats.switches;
  before_switch(from.stack_info, to.stack_info, dying);
  enter_race_context(to.race_context);
  vidrial_switch(&from.stack_pointer, to.stack_pointer);
  after_switch(from.stack_info);
}

inline unsigned random_below(unsigned n) {
  random_state = random_state * 1664525u + 1013904223u;
  return (random_state >> 8) % n;
}

// The runnable lane that comes next after `last` in the chosen order.
inline int next_lane(unsigned runnable, int last) {
  if (order == Order::Up) {
    unsigned const above = last < 31 ? runnable & (~0u << (last + 1)) : 0;
    return __builtin_ctz(above ? above : runnable);
  }
  if (order == Order::Down) {
    unsigned const below = runnable & ((1u << last) - 1);
    return 31 - __builtin_clz(below ? below : runnable);
  }
  for (unsigned skip = random_below(unsigned(__builtin_popcount(runnable))); skip; --skip) runnable &= runnable - 1;
  return __builtin_ctz(runnable);
}

// "0-31, 64": the threads that satisfy a condition.
template <class Condition>
void describe_threads(std::string& text, Condition condition) {
  for (int i = 0, shown = 0; i < thread_count; ++i) {
    if (!condition(i)) continue;
    int last = i;
    while (last + 1 < thread_count && condition(last + 1)) ++last;
    if (shown++ == 8) { text += ", ..."; return; }
    text += (shown > 1 ? ", " : "") + std::to_string(i) + (last > i ? "-" + std::to_string(last) : "");
    i = last;
  }
}

// What else may happen when no thread can go on, a copy that lands: false if nothing. What else explains why.
inline bool (*make_progress)() = [] { return false; };
inline void (*describe_state)(std::string&) = [](std::string&) {};

[[noreturn]] inline void deadlock() {
  std::string text;
  std::vector<bool> told(fibers.size());
  for (int i = 0, shown = 0; i < thread_count && shown < 8; ++i) {
    if (told[size_t(i)]) continue;
    Wait const wait = fibers[size_t(i)].wait;
    char const* const role = warps[size_t(i >> 5)].role;
    auto const same = [&](int j) {
      Wait const& w = fibers[size_t(j)].wait;
      return w.what == wait.what && w.place == wait.place && warps[size_t(j >> 5)].role == role;
    };
    for (int j = i; j < thread_count; ++j) if (same(j)) told[size_t(j)] = true;
    text += "\n  threads ";
    describe_threads(text, same);
    if (*role) text += std::string(" (") + role + ")";
    text += std::string(": ") + wait.what;
    if (wait.place) { char at[40]; snprintf(at, sizeof at, " at <place %lx>", place(wait.place)); text += at; }
    ++shown;
  }
  describe_state(text);
  fatal("deadlock: no thread can go on%s", text.c_str());
}

// Hand over to another fiber: one of the same warp first, so that a warp runs on to its next CTA barrier (a random order takes any, unless `eager`).
inline void reschedule(bool dying = false) {
  int const me = current, mine = me >> 5, count = int(warps.size());
  do {
    int const first = order == Order::Random && !(eager && warps[size_t(mine)].runnable) ? int(random_below(unsigned(count))) : mine;
    for (int i = 0; i < count; ++i) {
      int const w = (order == Order::Down ? first - i + count : first + i) % count;
      if (!warps[size_t(w)].runnable) continue;
      int const last = w == mine ? me & 31 : order == Order::Down ? 0 : 31;
      int const next = w * 32 + next_lane(warps[size_t(w)].runnable, last);
      if (next == me) return;
      Fiber& to = fibers[size_t(next)];
      current = next;
      threadIdx = to.index;
      return switch_to(fibers[size_t(me)], to, dying);
    }
  } while (live && make_progress());
  if (live) deadlock();
  switch_to(fibers[size_t(me)], main_fiber, true);
}

// To a thread that this one has woken; this one goes on when its turn comes.
inline void give_way(int next) {
  int const me = current;
  current = next;
  threadIdx = fibers[size_t(next)].index;
  switch_to(fibers[size_t(me)], fibers[size_t(next)]);
}

inline void wait_here(char const* what, void const* place) {
  fibers[size_t(current)].wait = {what, place};
  warp().runnable &= ~(1u << lane());
  reschedule();
}

inline void fiber_main() {
  first_entry(main_fiber.stack_info);
  observe(&cta_begin);
  thread_body();
  publish(&cta_end);
  Fiber& self = fibers[size_t(current)];
  self.done = true;
  self.wait = {"have returned", nullptr};
  --live;
  warp().runnable &= ~(1u << lane());
  reschedule(true);
  __builtin_unreachable();
}

inline void prepare(Fiber& fiber, int thread) {
  if (!fiber.stack) {
    void* const memory = mmap(nullptr, kStackBytes + kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) refuse("no memory for the stack of thread %d", thread);
    mprotect(memory, kPageBytes, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + kPageBytes;
    fiber.stack_info.bottom = fiber.stack;
    fiber.stack_info.bytes = kStackBytes;
    fiber.race_context = new_race_context(("CUDA thread " + std::to_string(thread)).c_str());
  }
  unpoison(fiber.stack, kStackBytes);
  // The frame that vidrial_switch takes off: zeroes, but for the address to return to, and a null caller above it.
#if defined(__x86_64__)
  constexpr int kFrame = 8, kReturn = 6;
#else
  constexpr int kFrame = 20, kReturn = 11;
#endif
  void** const frame = reinterpret_cast<void**>(fiber.stack + kStackBytes) - kFrame;
  std::fill(frame, frame + kFrame, nullptr);
  frame[kReturn] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = frame;
  unsigned const t = unsigned(thread);
  fiber.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
  fiber.done = false;
  fiber.object = nullptr;
  fiber.holds_operands = false;
  fiber.wait = {};
  warps[size_t(thread >> 5)].full |= 1u << (thread & 31);
}

// Run `thread_body` in every thread of one CTA.
inline void run_threads() {
  warps.assign(size_t(thread_count + 31) / 32, Warp{});
  fibers.resize(size_t(thread_count));
  for (int t = 0; t < thread_count; ++t) prepare(fibers[size_t(t)], t);
  for (Warp& w : warps) w.runnable = w.full;
  live = thread_count;
  main_fiber.race_context = race_context();
  publish(&cta_begin);
  current = order == Order::Down ? thread_count - 1 : 0;
  threadIdx = fibers[size_t(current)].index;
  switch_to(main_fiber, fibers[size_t(current)]);
  observe(&cta_end);
}

}  // namespace vidrial::host
