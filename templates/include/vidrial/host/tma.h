// TMA and bulk copies in software. Early (not `lazy`, or `eager`), a copy lands when it is issued; late, its target is NaN until no thread can go on.
// What has landed is told to the barrier, which publishes it: no thread sees it before it has waited.
#pragma once
#include <vidrial/host/mbarrier.h>

namespace vidrial::host {

// A copy into shared memory: `data` as it will lie there.
struct BulkLoad { char const* what; std::string name; void* place; Mbarrier* barrier; uint32_t target; std::vector<char> data; void* issued; };
// Bytes that one has brought, for which phase of its barrier, and whether a thread has waited for them.
struct Landed { char const* what; std::string name; void* place; Mbarrier* barrier; uint64_t phase; uint32_t target, bytes; bool waited; };
// A copy out of shared memory: its source must stay as it was until it is waited for.
struct BulkStore { void* place; char* target; uint32_t source; std::vector<char> data; };
struct BulkQueue { std::vector<BulkStore> stores; std::vector<size_t> groups; };
struct GlobalArray { char const* data; uint64_t bytes; };

inline std::deque<BulkLoad> flying;
inline std::vector<Landed> landed;
inline std::vector<BulkQueue> bulk_queues;
inline std::vector<GlobalArray> global_arrays;
inline void* tma_context = nullptr;

inline bool overlap(uint32_t a, size_t a_bytes, uint32_t b, size_t b_bytes) { return a < b + b_bytes && b < a + a_bytes; }

// A sanitizer sees the write in a context of its own, which knows what the issuing thread did before, and nothing else.
inline void land(BulkLoad const& load) {
  if (!tma_context) tma_context = new_race_context("TMA");
  void* const here = race_context();
  enter_race_context(tma_context);
  observe(load.issued);
  {
    OnBehalfOf const kernel(load.place);
    memcpy(shared_base + load.target, load.data.data(), load.data.size());
  }
  publish(load.barrier->key(load.barrier->phases));
  enter_race_context(here);
  if (seen.empty()) seen.resize(shared_bytes / 16 + 1);
  for (size_t i = 0; i < load.data.size(); i += 16) {
    Seen& chunk = seen[(load.target + i) / 16];
    memcpy(&chunk.chunk, &load.data[i], 16);
    chunk.fences = proxy_fences, chunk.landed = true;
  }
  landed.push_back({load.what, load.name, load.place, load.barrier, load.barrier->phases, load.target, uint32_t(load.data.size()), false});
  load.barrier->copy = load.place;
  load.barrier->bytes -= int64_t(load.data.size());
  complete_phase(*load.barrier);
}

// One of the copies on their way, the oldest unless the order is another.
inline bool land_one() {
  if (flying.empty()) return false;
  Unwatched const runtime;
  size_t const i = order == Order::Up ? 0 : order == Order::Down ? flying.size() - 1 : random_below(unsigned(flying.size()));
  BulkLoad const load = std::move(flying[i]);
  flying.erase(flying.begin() + ptrdiff_t(i));
  land(load);
  return true;
}

inline void mark_landed(Mbarrier const& b) {
  for (Landed& l : landed) l.waited |= l.barrier == &b && l.phase < b.phases;
}

// Who reads what a copy is still to bring has passed its barrier, which completed without these bytes, or has not waited at all.
inline std::string describe_flying(uint32_t address) {
  for (BulkLoad const& l : flying) {
    if (!overlap(address, 16, l.target, l.data.size())) continue;
    Mbarrier const& b = *l.barrier;
    size_t sent = 0;
    for (BulkLoad const& other : flying) if (other.barrier == l.barrier) sent += other.data.size();
    for (Landed const& other : landed) if (other.barrier == l.barrier && other.phase + 1 == b.phases) sent += other.bytes;
    char text[512];
    snprintf(text, sizeof text, "%s%s, issued at <place %lx>, has not brought yet: ", l.what, l.name.c_str(), place(l.place));
    std::string const why = b.phases ? "the phase of barrier " + b.name + " that was waited for announced " + std::to_string(b.announced[1]) + " bytes, and " +
                                           std::to_string(sent) + " were sent"
                                     : "its barrier " + b.name + " was not waited for";
    return text + why;
  }
  return "";
}

inline void begin_bulk_copies() {
  flying.clear();
  landed.clear();
  bulk_queues.assign(size_t(thread_count), {});
  make_progress = land_one;
  describe_copy = describe_flying;
  mark_waited = mark_landed;
}

inline void check_bulk_copies() {
  auto const block = [](char const* what, std::string const& name, void* where) {
    refuse("block (%u, %u, %u) ended before it waited for a %s%s, issued at <place %lx>", blockIdx.x, blockIdx.y, blockIdx.z, what, name.c_str(), place(where));
  };
  for (BulkLoad const& l : flying) block(l.what, l.name, l.place);
  for (Landed const& l : landed) if (!l.waited) block(l.what, l.name, l.place);
  for (BulkQueue const& q : bulk_queues) if (!q.stores.empty()) block("bulk_store", "", q.stores[0].place);
}

inline void check_source(char const* what, std::string const& name, char const* source, size_t bytes) {
#if !VIDRIAL_ASAN
  for (GlobalArray const& a : global_arrays) if (source >= a.data && source + bytes <= a.data + a.bytes) return;
  fatal("%s%s: it reads %zu bytes at %p, which are in no array of the launch: its box reaches over the end", what, name.c_str(), bytes, source);
#endif
}

inline void count_bulk(void const* global, size_t bytes, bool write) {
  counted().bulk_bytes += int64_t(bytes);
  touch(global, bytes, write);
}

inline void issue_load(BulkLoad load, uint32_t barrier) {
  char const* const what = load.what;
  char const* const name = load.name.c_str();
  load.barrier = &barrier_at(what, barrier, load.place);
  if (!in_shared(shared_base + load.target, int(load.data.size())))
    fatal("%s%s: its %zu bytes at the shared address 0x%x reach out of their region (the launch asked for %zu bytes)", what, name, load.data.size(), load.target, shared_bytes);
  for (BulkLoad const& other : flying)
    if (overlap(load.target, load.data.size(), other.target, other.data.size()))
      fatal("%s%s: at the shared address 0x%x another copy, issued at <place %lx>, has not landed yet: %s", what, name, load.target, place(other.place), kNoEmptyWait);
  for (size_t i = 0; i < landed.size();) {
    Landed const& other = landed[i];
    if (!overlap(load.target, load.data.size(), other.target, other.bytes)) { ++i; continue; }
    if (!other.waited)
      fatal("%s%s: at the shared address 0x%x lies what another copy, issued at <place %lx>, brought, and no thread has waited for that: %s", what, name,
            load.target, place(other.place), kNoEmptyWait);
    landed.erase(landed.begin() + ptrdiff_t(i));
  }
  load.issued = new_meeting();
  bool const late = lazy && !eager;
  if (late) {
    Watched const kernel(load.place);
    memset(shared_base + load.target, kPoisonByte, load.data.size());
  }
  publish(load.issued);
  if (late) flying.push_back(std::move(load));
  else land(load);
}

// The hardware swizzles addresses: three, two or one of the bits from 7 on are added to those from 4 on.
inline uint32_t swizzled(uint32_t address, uint32_t bits) { return address ^ (address >> 7 & ((1u << bits) - 1)) << 4; }

void tma_load(void const* encoded, uint32_t barrier, uint32_t target, int rank, int const* coordinates) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  TensorMap map;
  memcpy(&map, encoded, sizeof map);
  BulkLoad load{"tma_load", "", place, nullptr, target, {}, nullptr};
  if (map.magic != kTensorMapMagic) fatal("tma_load: what it is given is no tensor map");
  load.name = std::string(" of ") + map.name;
  if (rank != map.rank) fatal("tma_load%s: %d coordinates for a tensor of rank %d", load.name.c_str(), rank, map.rank);
  uint32_t const alignment = std::max(128u, map.swizzle ? 128u << map.swizzle : 0u);
  if (target % alignment) fatal("tma_load%s: the shared address 0x%x is not a multiple of %u, after which its swizzle repeats", load.name.c_str(), target, alignment);
  size_t const row = size_t(map.box[0]) * map.element_bytes;
  size_t rows = 1;
  for (int d = 1; d < rank; ++d) rows *= map.box[d];
  load.data.assign(rows * row, 0);
  std::vector<char> line(row);
  for (size_t r = 0; r < rows; ++r) {
    char const* source = map.base + map.offset;
    bool inside = true;
    size_t rest = r;
    for (int d = 1; d < rank; ++d) {
      int64_t const c = coordinates[d] + int64_t(rest % map.box[d]);
      rest /= map.box[d];
      inside &= c >= 0 && c < int64_t(map.dims[d]);
      source += c * int64_t(map.strides[d - 1]);
    }
    int64_t const first = std::max<int64_t>(coordinates[0], 0), last = std::min<int64_t>(int64_t(coordinates[0]) + map.box[0], map.dims[0]);
    std::fill(line.begin(), line.end(), 0);
    if (inside && first < last) {
      size_t const bytes = size_t(last - first) * map.element_bytes;
      source += first * map.element_bytes;
      check_source("tma_load", load.name, source, bytes);
      count_bulk(source, bytes, false);
      Watched const kernel(load.place);
      memcpy(&line[size_t(first - coordinates[0]) * map.element_bytes], source, bytes);
    }
    for (size_t i = 0; i < row; i += 16) memcpy(&load.data[swizzled(uint32_t(target + r * row + i), map.swizzle) - target], &line[i], 16);
  }
  ++counted().bulk_copies;
  issue_load(std::move(load), barrier);
}

inline void check_bulk(char const* what, void const* global, uint32_t shared, uint32_t bytes) {
  if (!bytes || bytes % 16 || uintptr_t(global) % 16 || shared % 16) fatal("%s: %u bytes between %p and the shared address 0x%x; all three must be multiples of 16", what, bytes, global, shared);
}

void bulk_load(uint32_t barrier, uint32_t target, void const* source, uint32_t bytes) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  BulkLoad load{"bulk_load", "", place, nullptr, target, std::vector<char>(bytes), nullptr};
  check_bulk("bulk_load", source, target, bytes);
  check_source("bulk_load", "", static_cast<char const*>(source), bytes);
  ++counted().bulk_copies;
  count_bulk(source, bytes, false);
  {
    Watched const kernel(load.place);
    memcpy(load.data.data(), source, bytes);
  }
  issue_load(std::move(load), barrier);
}

inline void store(BulkStore const& s) {
  Watched const kernel(s.place);
  memcpy(s.target, s.data.data(), s.data.size());
}

void bulk_store(void* target, uint32_t source, uint32_t bytes) {
  void* const place = __builtin_return_address(0);
  Unwatched const runtime;
  BulkStore s{place, static_cast<char*>(target), source, std::vector<char>(bytes)};
  check_bulk("bulk_store", target, source, bytes);
  if (!in_shared(shared_base + source, int(bytes))) fatal("bulk_store: its %u bytes at the shared address 0x%x reach out of their region", bytes, source);
  if (!proxy_fences) fatal("bulk_store: its source at the shared address 0x%x was written, and no thread has called fence_async_proxy since", source);
  {
    Watched const kernel(s.place);
    memcpy(s.data.data(), shared_base + source, bytes);
  }
  ++counted().bulk_copies;
  count_bulk(target, bytes, true);
  if (!lazy) store(s);
  bulk_queues[size_t(current)].stores.push_back(std::move(s));
}

void bulk_commit() {
  Unwatched const runtime;
  BulkQueue& q = bulk_queues[size_t(current)];
  q.groups.push_back(q.stores.size());
}

void bulk_wait(int pending) {
  Unwatched const runtime;
  BulkQueue& q = bulk_queues[size_t(current)];
  ptrdiff_t const finished = ptrdiff_t(q.groups.size()) - pending;
  if (finished <= 0) return;
  size_t const end = q.groups[size_t(finished - 1)];
  for (size_t i = 0; i < end; ++i) {
    BulkStore const& s = q.stores[i];
    if (memcmp(shared_base + s.source, s.data.data(), s.data.size()))
      fatal("bulk_store: its source at the shared address 0x%x was overwritten before the wait; it was issued at <place %lx>", s.source, place(s.place));
    if (lazy) store(s);
  }
  q.stores.erase(q.stores.begin(), q.stores.begin() + ptrdiff_t(end));
  q.groups.erase(q.groups.begin(), q.groups.begin() + finished);
  for (size_t& g : q.groups) g -= end;
}

}  // namespace vidrial::host
