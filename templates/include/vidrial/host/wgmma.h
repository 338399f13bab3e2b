// wgmma in software. A warpgroup's instruction is queued by each thread when it is issued and executed, in order, at the wait that
// retires its group; until then its accumulators are NaN, and what it reads must not change. Not `lazy`: executed when issued.
// NOTE: no std::copy or std::equal: sanitizers watch what they call, and one thread works on the queues of all.
#pragma once
#include <vidrial/host/warp_ops.h>

namespace vidrial::host {

inline constexpr int kGroupThreads = 128, kMostColumns = 256;
// What an accumulator holds while a wgmma is on its way: a signalling NaN, so that arithmetic on it (+=, *=) leaves another one.
inline constexpr uint32_t kInFlight = 0x7f85a5a5;

// 16 bytes of a matrix: what swizzles move about as a whole.
struct Chunk { uint64_t low, high; };
inline bool operator!=(Chunk const& x, Chunk const& y) { return x.low != y.low || x.high != y.high; }

// Where a thread's accumulators are: as a rule one behind the other, from `first` on; else in `each`.
struct Registers {
  int count;
  float* first;
  float* each[kMostColumns / 2];
  // Only what N needs is written.
  Registers() {}
  void set(float* const* registers, int n) {
    count = n, first = registers[0];
    for (int v = 0; v < n; ++v) if (registers[v] != registers[0] + v) first = nullptr;
    for (int v = 0; v < n && !first; ++v) each[v] = registers[v];
  }
  float* operator[](int v) const { return first ? first + v : each[v]; }
  bool operator==(Registers const& other) const {
    if (count != other.count || first != other.first) return false;
    for (int v = 0; v < count && !first; ++v) if (each[v] != other.each[v]) return false;
    return true;
  }
};

// `b`, `a`: what this lane reads for its warp, chunks lane, lane + 32, ... of B and one of the warp's 16 rows of A. `c`: the
// accumulators, unless an earlier wgmma on its way brings them.
struct Operation {
  Wgmma instruction;
  void* place;
  void const* object;
  uint32_t const* held;
  bool done;
  Chunk a, b[2 * kMostColumns / 32];
  float c[kMostColumns / 2];
  Registers registers;
  Operation() {}
};
// `stack`: of the first operation, which a warpgroup's first thread notes for all.
struct WgmmaQueue { std::vector<Operation> operations; std::vector<size_t> groups; size_t retiring = 0; bool arrived = false; std::string stack; };
struct Warpgroup { int arrived = 0; char const* what = ""; };
// What a wgmma found in 16 bytes, or TMA brought there (`landed`: no fence is needed), and after how many proxy fences.
struct Seen { Chunk chunk; unsigned fences; bool landed; };

inline std::vector<WgmmaQueue> wgmma_queues;
inline std::vector<Warpgroup> warpgroups;
inline std::vector<Seen> seen;
inline unsigned proxy_fences = 0;
// Which copy still brings the 16 bytes at an address, and why nobody waited for it; "" if none does: host/tma.h.
inline std::string (*describe_copy)(uint32_t) = [](uint32_t) { return std::string(); };

inline void begin_wgmmas() {
  size_t const groups = size_t(thread_count + kGroupThreads - 1) / kGroupThreads;
  wgmma_queues.assign(groups * kGroupThreads, {});
  warpgroups.assign(groups, {});
  seen.clear();
  proxy_fences = 0;
}

// Nothing may be on its way when a CTA ends.
inline void check_wgmmas() {
  for (size_t t = 0; t < wgmma_queues.size(); ++t) {
    WgmmaQueue const& q = wgmma_queues[t];
    if (!q.operations.empty())
      refuse("block (%u, %u, %u), thread %zu ended with %zu wgmma that it %s, the first issued at <place %lx>%s", blockIdx.x, blockIdx.y, blockIdx.z, t,
             q.operations.size(), q.groups.empty() ? "never committed" : "never waited for", place(q.operations[0].place), q.stack.c_str());
  }
}

void fence_async_proxy() { ++proxy_fences; }

// A matrix in shared memory, `width` chunks, 1 << `shift`, in a row of its swizzle. The canonical layouts: cute/atom/mma_traits_sm90_gmma.hpp.
struct Matrix {
  char name;
  bool mn_major;
  uint32_t shift, width, start, leading, stride;

  Matrix(char name, uint64_t descriptor, bool mn_major) : name(name), mn_major(mn_major) {
    uint32_t const layout = uint32_t(descriptor >> 62);
    shift = layout ? 4 - layout : 0, width = 1 << shift;
    start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    if (uint64_t const other = descriptor & ~0xc00e3fff3fff3fffull)
      fatal("wgmma: the descriptor %016llx of %c has bits %016llx, which mean nothing", (unsigned long long)descriptor, name, (unsigned long long)other);
    if (unsigned const base = unsigned(descriptor >> 49 & 7))
      fatal("wgmma: the descriptor %016llx of %c has base offset %u; here it must be 0", (unsigned long long)descriptor, name, base);
    uint32_t const row = 16 * width;
    if (width > 1 && start / row % 8)
      fatal("wgmma: the descriptor of %c is misaligned: the %u-byte swizzle repeats every %u bytes, and the start address 0x%x is %u bytes past such a multiple; less than %u are accepted",
            name, row, 8 * row, start, start % (8 * row), row);
  }

  // Chunk c has 8 values of k of row c / 2, or 8 rows of k = c % 16.
  uint32_t address(uint32_t c) const {
    uint32_t const k = c % 16, rows = c / 16, row = c / 2, inner = c % 2;
    uint32_t const a = start + (!mn_major ? (row % 8 * 16 << shift) + row / 8 * stride + inner * (width == 1 ? leading : 16)
                                : width == 1 ? rows * stride + k % 8 * 16 + k / 8 * leading
                                             : (rows & (width - 1)) * 16 + (rows >> shift) * leading + (k % 8 * 16 << shift) + k / 8 * stride);
    return a ^ (a >> 3 & (width - 1) * 16);
  }

  Chunk read(uint32_t c) const {
    uint32_t const a = address(c);
#if !VIDRIAL_ASAN
    if (!in_shared(shared_base + a, 16)) fatal("wgmma: its %c reaches the shared address 0x%x, which is not in dynamic shared memory (the launch asked for %zu bytes)", name, a, shared_bytes);
#endif
    Chunk chunk;
    memcpy(&chunk, shared_base + a, sizeof chunk);
    return chunk;
  }

  // Stores and cp.async are seen by wgmma only behind a proxy fence. Which thread's is not known: only that there was none is.
  Chunk read_behind_fence(uint32_t c) const {
    Chunk const chunk = read(c);
    if (seen.empty()) seen.resize(shared_bytes / 16 + 1);
    Seen& previous = seen[address(c) / 16];
    if ((!proxy_fences && !previous.landed) || (previous.fences == proxy_fences && previous.chunk != chunk)) {
      std::string const copy = describe_copy(address(c));
      if (!copy.empty()) fatal("wgmma: its %c at the shared address 0x%x is what a %s", name, address(c), copy.c_str());
      fatal("wgmma: its %c at the shared address 0x%x was written, and no thread has called fence_async_proxy since", name, address(c));
    }
    previous = {chunk, proxy_fences, previous.landed};
    return chunk;
  }
};

template <class Visit>
void visit_chunks(Operation& o, Visit visit) {
  Wgmma const& i = o.instruction;
  OnBehalfOf const kernel(o.place);
  Matrix const b('B', i.b_descriptor, i.b_mn_major);
  for (int c = lane(), slot = 0; c < 2 * i.n; c += 32, ++slot) visit(b, uint32_t(c), o.b[slot]);
  if (i.a_shared) visit(Matrix('A', i.a_descriptor, i.a_mn_major), uint32_t(current % kGroupThreads), o.a);
}

inline float widen(uint32_t x, bool half) {
  if (!half) return bits<float>(x << 16);
  // Exact for subnormal numbers, too.
  float const magnitude = (x & 0x7c00) == 0x7c00 ? bits<float>((x & 0x3ff) << 13 | 0x7f800000) : bits<float>((x & 0x7fff) << 13) * 0x1p112f;
  return x & 0x8000 ? -magnitude : magnitude;
}
inline uint32_t element(Chunk const& chunk, int e) { return uint32_t((e < 4 ? chunk.low : chunk.high) >> 16 * (e % 4)) & 0xffff; }

// Matrix [k][row] from the chunks that `of(c)` gives.
template <int Columns, class Of>
void spread(float (*matrix)[Columns], int rows, bool mn_major, bool half, Of of) {
  for (int c = 0; c < 2 * rows; ++c) {
    Chunk const chunk = of(c);
    for (int e = 0; e < 8; ++e) {
      float const value = widen(element(chunk, e), half);
      if (mn_major) matrix[c % 16][c / 16 * 8 + e] = value;
      else matrix[c % 2 * 8 + e][c / 2] = value;
    }
  }
}

// B [k][n] of the warp, in place from one warp to the next: all four find the same, unless threads race.
inline float const (*spread_b(Operation* const* lanes, bool first))[kMostColumns] {
  alignas(32) static float b[16][kMostColumns];
  static Chunk spread_chunks[2 * kMostColumns];
  Wgmma const& i = lanes[0]->instruction;
  bool differs = first;
  for (int c = 0; c < 2 * i.n; ++c) {
    Chunk const& chunk = lanes[c % 32]->b[c / 32];
    differs |= chunk != spread_chunks[c];
    spread_chunks[c] = chunk;
  }
  if (differs) spread(b, i.n, i.b_mn_major, i.half, [](int c) { return spread_chunks[c]; });
  return b;
}

// 16 rows of D by one warp: exact products, summed in float in the order of k (the hardware's order is not specified).
inline void multiply_rows(Operation* const* lanes, float const (*b)[kMostColumns]) {
  using Four = float __attribute__((vector_size(16)));
  alignas(16) static float a[16][16], d[16][kMostColumns];
  Wgmma const& i = lanes[0]->instruction;
  if (i.a_shared) spread(a, 16, i.a_mn_major, i.half, [&](int c) { return lanes[c]->a; });
  for (int t = 0; t < 32; ++t) {
    Operation const& o = *lanes[t];
    int const row = t >> 2, pair = (t & 3) * 2;
    for (int v = 0; v < 8 && !i.a_shared; ++v)
      a[pair + (v & 1) + (v >> 2) * 8][row + (v >> 1 & 1) * 8] = widen(o.instruction.a[v >> 1] >> 16 * (v & 1) & 0xffff, i.half);
    for (int n = 0; n < i.n; n += 8)
      for (int v = 0; v < 4; ++v) d[row + (v >> 1) * 8][n + pair + (v & 1)] = i.accumulate ? o.c[n / 2 + v] : 0;
  }
  if (i.negate) for (auto& column : a) for (float& x : column) x = -x;
  for (int m = 0; m < 16; m += 4)
    for (int n = 0; n < i.n; n += 8) {
      Four sum[8];
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) sum[r] = *reinterpret_cast<Four const*>(&d[m + r / 2][n + r % 2 * 4]);
      for (int k = 0; k < 16; ++k)
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) sum[r] += a[k][m + r / 2] * *reinterpret_cast<Four const*>(&b[k][n + r % 2 * 4]);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) *reinterpret_cast<Four*>(&d[m + r / 2][n + r % 2 * 4]) = sum[r];
    }
  for (int t = 0; t < 32; ++t)
    for (int n = 0; n < i.n; n += 8)
      for (int v = 0; v < 4; ++v) lanes[t]->c[n / 2 + v] = d[(t >> 2) + (v >> 1) * 8][n + (t & 3) * 2 + (v & 1)];
}

// The next wgmma of a thread on the same accumulators, at or behind `index`.
inline Operation* on_same_registers(WgmmaQueue& q, size_t index, Registers const& registers) {
  for (; index < q.operations.size(); ++index)
    if (q.operations[index].registers == registers) return &q.operations[index];
  return nullptr;
}

// Operation `index` of all threads of a warpgroup.
inline void execute(int first, size_t index) {
  Operation* threads[kGroupThreads];
  for (int t = 0; t < kGroupThreads; ++t) {
    WgmmaQueue& q = wgmma_queues[size_t(first + t)];
    threads[t] = index < q.operations.size() ? &q.operations[index] : nullptr;
    Wgmma const &x = threads[0]->instruction, *const y = threads[t] ? &threads[t]->instruction : nullptr;
    if (!y || x.n != y->n || x.a_descriptor != y->a_descriptor || x.b_descriptor != y->b_descriptor || x.accumulate != y->accumulate || x.half != y->half ||
        x.a_mn_major != y->a_mn_major || x.b_mn_major != y->b_mn_major || x.a_shared != y->a_shared || x.negate != y->negate)
      fatal("warpgroup divergence: threads %d and %d issued different wgmma, N = %d with B %016llx and N = %d with B %016llx, the first at <place %lx>", first,
            first + t, x.n, (unsigned long long)x.b_descriptor, y ? y->n : 0, (unsigned long long)(y ? y->b_descriptor : 0), place(threads[0]->place));
  }
  if (threads[0]->done) return;
  for (int w = 0; w < kGroupThreads; w += 32) multiply_rows(threads + w, spread_b(threads + w, w == 0));
  ++counts_of(threads[0]->object).wgmma;
  for (int t = 0; t < kGroupThreads; ++t) {
    Operation& o = *threads[t];
    o.done = true;
    Operation* const next = on_same_registers(wgmma_queues[size_t(first + t)], index + 1, o.registers);
    for (int v = 0; v < o.registers.count; ++v) (next ? next->c[v] : *o.registers[v]) = o.c[v];
  }
}

// All threads of a warpgroup come here; the last runs `operation(first thread)`. It orders no memory.
template <class Operation>
void meet_warpgroup(char const* what, void const* place, Operation operation) {
  Warpgroup& g = warpgroups[size_t(current / kGroupThreads)];
  int const first = current / kGroupThreads * kGroupThreads;
  if (g.arrived && g.what != what) fatal("warpgroup divergence: %d of its threads %s, this thread comes to: %s", g.arrived, g.what, what);
  g.what = what;
  if (++g.arrived < kGroupThreads) return wait_here(what, place);
  g.arrived = 0;
  for (int w = first / 32; w < first / 32 + 4; ++w) warps[size_t(w)].runnable = warps[size_t(w)].full;
  operation(first);
}

inline void require_warpgroup(char const* what) {
  size_t const first = size_t(current / kGroupThreads * 4);
  for (size_t w = first; w < first + 4; ++w)
    if (w >= warps.size() || warps[w].full != ~0u)
      fatal("%s: it takes the 128 threads of warps %zu to %zu, the CTA has only %d", what, first, first + 3, thread_count);
}

void wgmma_arrive() {
  require_warpgroup("warpgroup_arrive");
  wgmma_queues[size_t(current)].arrived = true;
}

void wgmma(Wgmma const& instruction, float* const* registers, uint32_t const* a) {
  require_warpgroup("wgmma");
  WgmmaQueue& q = wgmma_queues[size_t(current)];
  if (!q.arrived) fatal("wgmma: no warpgroup_arrive came before it");
  size_t const index = q.operations.size();
  Operation& o = q.operations.emplace_back();
  Registers& mine = o.registers;
  mine.set(registers, instruction.n / 2);
  bool const follows = lazy && on_same_registers(q, 0, mine) != &o;
  o.instruction = instruction;
  o.place = __builtin_return_address(0);
  if (!index && current % kGroupThreads == 0) {
    char text[kTextBytes / 16];
    describe_stack(text, sizeof text);
    q.stack = text;
  }
  o.object = fibers[size_t(current)].object;
  o.held = a;
  o.done = false;
  visit_chunks(o, [](Matrix const& matrix, uint32_t c, Chunk& chunk) { chunk = matrix.read_behind_fence(c); });
  for (int v = 0; v < mine.count && !follows; ++v) o.c[v] = *mine[v];
  if (!lazy) return meet_warpgroup("wait in wgmma", o.place, [index](int first) { execute(first, index); });
  for (int v = 0; v < mine.count && !follows; ++v) *mine[v] = bits<float>(kInFlight);
}

void wgmma_commit() {
  require_warpgroup("warpgroup_commit_batch");
  WgmmaQueue& q = wgmma_queues[size_t(current)];
  q.groups.push_back(q.operations.size());
}

// Between issue and wait nobody may touch what a wgmma works on. `frame`: what lies below it on the stack is gone.
inline void check_untouched(WgmmaQueue& q, size_t index, void const* frame) {
  Operation& o = q.operations[index];
  visit_chunks(o, [&](Matrix const& matrix, uint32_t c, Chunk const& chunk) {
    if (matrix.read(c) != chunk)
      fatal("wgmma: its %c at the shared address 0x%x was overwritten before the wait; it was issued at <place %lx>", matrix.name, matrix.address(c), place(o.place));
  });
  char const* const stack = fibers[size_t(current)].stack;
  auto const gone = [&](void const* p) { return p >= stack && p < frame; };
  for (int r = 0; r < 4 && o.held && !gone(o.held); ++r)
    if (o.held[r] != o.instruction.a[r]) fatal("wgmma: its A, register %d, was written before the wait; it was issued at <place %lx>", r, place(o.place));
  // What works on the same accumulators later looks after them.
  if (on_same_registers(q, index + 1, o.registers)) return;
  for (int v = 0; v < o.registers.count; ++v) {
    if (gone(o.registers[v])) fatal("wgmma: its accumulators went out of scope before the wait; it was issued at <place %lx>", place(o.place));
    if (bits<uint32_t>(*o.registers[v]) != kInFlight)
      fatal("wgmma: its accumulator %d was written before the wait; it was issued at <place %lx>", v, place(o.place));
  }
}

// All but the last `pending` groups are executed when this returns.
void wgmma_wait_group(int pending) {
  require_warpgroup("warpgroup_wait");
  WgmmaQueue& q = wgmma_queues[size_t(current)];
  ptrdiff_t const finished = ptrdiff_t(q.groups.size()) - pending;
  if (finished <= 0) return;
  size_t const end = q.retiring = q.groups[size_t(finished - 1)];
  for (size_t i = 0; i < end && lazy; ++i) check_untouched(q, i, __builtin_frame_address(0));
  meet_warpgroup("wait in warpgroup_wait", __builtin_return_address(0), [end](int first) {
    for (int t = first; t < first + kGroupThreads; ++t)
      if (wgmma_queues[size_t(t)].retiring != end) fatal("warpgroup divergence: thread %d waits for %zu wgmma, thread %d for %zu", t, wgmma_queues[size_t(t)].retiring, current, end);
    for (size_t i = 0; i < end; ++i) execute(first, i);
  });
  q.operations.erase(q.operations.begin(), q.operations.begin() + ptrdiff_t(end));
  q.groups.erase(q.groups.begin(), q.groups.begin() + finished);
  for (size_t& g : q.groups) g -= end;
}

}  // namespace vidrial::host
