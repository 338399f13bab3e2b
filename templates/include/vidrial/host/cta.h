// What the threads of a CTA do together: barriers, warp collectives, cp.async.
#pragma once
#include <vidrial/host/shared.h>

namespace vidrial::host {

inline struct { int arrived = 0; void* meeting = nullptr; char const* file = ""; int line = 0; } barrier;

void sync_threads(char const* file, int line) {
  if (!barrier.arrived) barrier.meeting = new_meeting(), barrier.file = file, barrier.line = line;
  else if (barrier.line != line || strcmp(barrier.file, file)) {
    std::string waiting;
    describe_threads(waiting, [](int t) { return fibers[size_t(t)].wait.what == std::string("wait in __syncthreads") && !(warps[size_t(t >> 5)].runnable >> (t & 31) & 1); });
    fatal("barrier divergence: threads %s wait in __syncthreads at %s:%d, this thread is in the one at %s:%d", waiting.c_str(), barrier.file, barrier.line, file, line);
  }
  void* const meeting = barrier.meeting;
  publish(meeting);
  if (++barrier.arrived == thread_count) {
    barrier.arrived = 0;
    for (Warp& w : warps) w.runnable = w.full;
    reschedule();
  } else {
    wait_here("wait in __syncthreads", __builtin_return_address(0));
  }
  observe(meeting);
}

// Every lane of `mask` brings its argument; the last to arrive runs `operation(Argument* [32])` for all of them. Only __syncwarp
// `orders` memory: a shuffle or an ldmatrix is no barrier.
template <class Argument, class Operation>
void collective(char const* what, unsigned mask, void const* place, Argument& argument, Operation operation, bool orders = false) {
  Warp& w = warp();
  unsigned const me = 1u << lane();
  mask &= w.full;
  if (!(mask & me)) fatal("%s: lane %d is not in its own mask %08x", what, lane(), mask);
  Slot* free = nullptr;
  Slot* found = nullptr;
  for (Slot& s : w.slots) {
    if (s.mask == mask) { found = &s; break; }
    if (!s.mask && !free) free = &s;
  }
  // At most 32 masks can wait at once: each has a lane of its own.
  Slot& slot = found ? *found : *free;
  if (!found) slot.what = what, slot.mask = mask, slot.meeting = new_meeting();
  else if (slot.what != what) fatal("warp divergence: lanes %08x %s, this lane comes to: %s", slot.arrived, slot.what, what);
  void* const meeting = slot.meeting;
  if (orders) publish(meeting);
  slot.arguments[lane()] = &argument;
  slot.arrived |= me;
  if (slot.arrived == mask) {
    slot.arrived = slot.mask = 0;
    w.runnable |= mask;
    operation(reinterpret_cast<Argument**>(slot.arguments));
  } else {
    wait_here(what, place);
  }
  if (orders) observe(meeting);
}

// For instructions that the whole warp has to execute.
inline void require_full_warp(char const* what) {
  if (warp().full != ~0u) fatal("%s: the warp has only %d threads", what, __builtin_popcount(warp().full));
}

void sync_warp(unsigned mask) {
  int nothing = 0;
  collective("wait in __syncwarp", mask, __builtin_return_address(0), nothing, [](int**) {}, true);
}

template <class T> struct Exchange { T value, result; int source; };

uint64_t shuffle(unsigned mask, uint64_t value, int source) {
  Exchange<uint64_t> mine{value, 0, source};
  collective("wait in a shuffle", mask, __builtin_return_address(0), mine, [full = mask & warp().full](Exchange<uint64_t>** lanes) {
    for (int i = 0; i < 32; ++i)
      if (full >> i & 1) lanes[i]->result = full >> lanes[i]->source & 1 ? lanes[lanes[i]->source]->value : ~uint64_t(0);
  });
  return mine.result;
}

unsigned vote(unsigned mask, bool mine) {
  Exchange<unsigned> argument{mine, 0, 0};
  collective("wait in a vote", mask, __builtin_return_address(0), argument, [full = mask & warp().full](Exchange<unsigned>** lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) if (full >> i & 1) all |= lanes[i]->value << i;
    for (int i = 0; i < 32; ++i) if (full >> i & 1) lanes[i]->result = all;
  });
  return argument.result;
}

// One cp.async on its way. The source is read when it is issued, and `place` kept, so that the right line is blamed.
struct Copy { void* target; void* place; int bytes; char data[16]; };
struct CopyQueue { std::vector<Copy> copies; std::vector<size_t> groups; };

inline std::vector<CopyQueue> queues;

inline void land(Copy const& copy) {
  OnBehalfOf const kernel(copy.place);
  memcpy(copy.target, copy.data, size_t(copy.bytes));
}

void cp_async(void* target, void const* source, int bytes, int valid) {
  void* const place = __builtin_return_address(0);
  if (uintptr_t(target) % unsigned(bytes)) fatal("cp.async: the shared-memory address %p is not a multiple of its %d bytes", target, bytes);
  if (valid && uintptr_t(source) % unsigned(bytes)) fatal("cp.async: the global address %p is not a multiple of its %d bytes", source, bytes);
#if !VIDRIAL_ASAN
  if (!in_shared(target, bytes)) fatal("cp.async: its target is not in shared memory (the launch asked for %zu bytes)", shared_bytes);
#endif
  Copy copy{target, place, bytes, {}};
  OnBehalfOf const kernel(place);
  memcpy(copy.data, source, size_t(valid));
  counted().cp_async_bytes += valid;
  // NOTE: where nothing is read, the thread takes its turn all the same: the warp's other threads issue the same instruction.
  global_copies.add(place, valid ? uintptr_t(source) : 0);
  if (valid) touch(source, size_t(valid), false);
  if (!lazy) return land(copy);
  memset(target, kPoisonByte, size_t(bytes));
  queues[size_t(current)].copies.push_back(copy);
}

void cp_async_commit() {
  CopyQueue& q = queues[size_t(current)];
  q.groups.push_back(q.copies.size());
}

// Land the first `count` copies of this thread.
inline void land_first(CopyQueue& q, size_t count) {
  for (size_t i = 0; i < count; ++i) land(q.copies[i]);
  q.copies.erase(q.copies.begin(), q.copies.begin() + ptrdiff_t(count));
}

// All but the last `pending` groups have landed when this returns.
void cp_async_wait_group(int pending) {
  CopyQueue& q = queues[size_t(current)];
  ptrdiff_t const finished = ptrdiff_t(q.groups.size()) - pending;
  if (finished <= 0) return;
  size_t const end = q.groups[size_t(finished - 1)];
  land_first(q, end);
  q.groups.erase(q.groups.begin(), q.groups.begin() + finished);
  for (size_t& g : q.groups) g -= end;
}

// Waits for copies that no group holds, too.
void cp_async_wait_all() {
  CopyQueue& q = queues[size_t(current)];
  land_first(q, q.copies.size());
  q.groups.clear();
}

// Tiles that nobody has drawn yet from one counter of a dynamic schedule, and the blocks that have begun to draw.
struct Draws { int const* counter; std::vector<int> left; std::vector<uint3> blocks; };
inline std::vector<Draws> draws;

// A block draws its tiles alone here. In rising order it takes all that are left; else now and then it leaves some, as if another block had been
// faster, to the blocks that come later. What it draws rises, as on the GPU.
int draw_tile(int drawn, int const* counter, int tile, int tiles) {
  auto found = std::find_if(draws.begin(), draws.end(), [&](Draws const& d) { return d.counter == counter; });
  if (found == draws.end()) {
    if (drawn) fatal("the counter of a dynamic schedule is %d at the first draw; it must be 0 before each launch", drawn);
    found = draws.insert(draws.end(), {counter, {}, {}});
    for (int t = int(gridDim.x); t < tiles; ++t) found->left.push_back(t);
  }
  auto& [_, left, blocks] = *found;
  if (blocks.empty() || memcmp(&blocks.back(), &blockIdx, sizeof blockIdx)) blocks.push_back(blockIdx);
  auto next = std::upper_bound(left.begin(), left.end(), tile);
  if (order != Order::Up && blocks.size() < gridDim.x) next += std::min<ptrdiff_t>(left.end() - next, random_below(3) + (random_below(4) ? 0 : tiles));
  if (next == left.end()) return tiles;
  int const result = *next;
  left.erase(next);
  return result;
}

inline void run_cta() {
  poison_shared();
  queues.assign(size_t(thread_count), {});
  begin_counts();
  barrier.arrived = 0;
  run_threads();
  for (CopyQueue& q : queues) land_first(q, q.copies.size());
  check_shared();
  end_counts();
}

}  // namespace vidrial::host
