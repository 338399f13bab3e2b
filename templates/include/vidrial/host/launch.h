// The runtime, whole; its main(): a request on stdin (grid, arguments, arrays), every CTA in turn, the changed arrays on stdout.
#pragma once
#include <csignal>
#include <ctime>
#include <ucontext.h>
#include <sys/time.h>
#include <vidrial/host/tma.h>

namespace vidrial::host {

// NOTE: vidrial.host packs these three, and Gap, in the same order.
struct Request { uint32_t grid[3], block[3]; uint32_t landing, order; double timeout; uint64_t shared_bytes, packed_bytes, arrays, pointers, gaps; };
// `shift`: the array's address modulo 256.
struct ArrayEntry { uint64_t bytes, shift; };
struct PointerEntry { uint64_t offset, array, delta; };
struct Array { char* data; uint64_t bytes; std::vector<char> original; };

inline constexpr size_t kArrayAlignment = 256, kArrayGuardBytes = VIDRIAL_ASAN ? 0 : 64;

// The processor's, so that it says the same on a busy machine.
inline double now() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

inline void read_all(void* data, size_t bytes) {
  if (bytes && fread(data, 1, bytes, stdin) != bytes) refuse("the request is incomplete");
}
template <class T> inline std::vector<T> read_many(size_t count) {
  std::vector<T> items(count);
  read_all(items.data(), count * sizeof(T));
  return items;
}

// Exactly as many bytes as the caller's array has, so that the first byte past its end is noticed.
inline Array read_array(ArrayEntry const& entry) {
  void* memory;
  if (posix_memalign(&memory, kArrayAlignment, entry.shift + entry.bytes + kArrayGuardBytes)) refuse("no memory for an array of %zu bytes", size_t(entry.bytes));
  Array a{static_cast<char*>(memory) + entry.shift, entry.bytes, read_many<char>(entry.bytes)};
  memset(memory, kGuardByte, entry.shift);
  memcpy(a.data, a.original.data(), a.bytes);
  memset(a.data + a.bytes, kGuardByte, kArrayGuardBytes);
  // NOTE: AddressSanitizer forgets partial granules at the start of a block, so an odd shift is guarded from 8 bytes below only.
  poison(memory, entry.shift & ~uint64_t(7));
  return a;
}

inline void check_array(Array const& a, uint64_t offset) {
  for (size_t i = 0; i < kArrayGuardBytes; ++i)
    if (a.data[a.bytes + i] != kGuardByte) refuse("the array at offset %zu of the arguments was written %s its end (it has %zu bytes; AddressSanitizer has the line)", size_t(offset), behind(i).c_str(), size_t(a.bytes));
}

inline void on_signal(int number, siginfo_t*, void* context) {
#if defined(__x86_64__)
  interrupted_at = reinterpret_cast<void const*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#else
  interrupted_at = reinterpret_cast<void const*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#endif
  if (number == SIGALRM) fatal("the launch ran out of time");
  fatal("signal %d (%s)", number, strsignal(number));
}

inline void watch(double seconds) {
  static char stack[64 << 10];
  void* frames[1];
  // NOTE: the first call loads a library, which a signal handler may not do.
  backtrace(frames, 1);
  stack_t const alternate{stack, 0, sizeof stack};
  sigaltstack(&alternate, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGALRM, &action, nullptr);
  if (!VIDRIAL_ASAN && !VIDRIAL_TSAN)
    for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigaction(number, &action, nullptr);
  itimerval const timer{{0, 0}, {time_t(seconds), suseconds_t((seconds - double(time_t(seconds))) * 1e6)}};
  setitimer(ITIMER_REAL, &timer, nullptr);
}

// Blocks take turns in the order of the lanes.
inline std::vector<uint64_t> block_order(uint64_t count) {
  std::vector<uint64_t> blocks(count);
  for (uint64_t i = 0; i < count; ++i) blocks[i] = order == Order::Down ? count - 1 - i : i;
  for (uint64_t i = count; order == Order::Random && i > 1; --i) std::swap(blocks[i - 1], blocks[random_below(unsigned(i))]);
  return blocks;
}

inline void run_grid(Request const& r) {
  double const start = now();
  uint64_t const plane = uint64_t(r.grid[0]) * r.grid[1];
  for (uint64_t block : block_order(plane * r.grid[2])) {
    blockIdx = {unsigned(block % r.grid[0]), unsigned(block % plane / r.grid[0]), unsigned(block / plane)};
    begin_wgmmas();
    begin_barriers();
    begin_bulk_copies();
    run_cta();
    check_wgmmas();
    check_bulk_copies();
  }
  stats.seconds = now() - start;
}

// Sectors that differ from what they were are written, whatever the compiler said of it.
inline void count_bytes(std::vector<Array> const& arrays) {
  for (size_t i = 0; i < arrays.size() && VIDRIAL_ACCESSES; ++i) {
    Touched& t = touched[i];
    for (uint64_t b = 0; b < t.bytes; ++b)
      if (t.data[b] != arrays[i].original[b]) t.sectors[t.place(t.data + b)] |= Touched::kWritten;
    for (unsigned char s : t.sectors) stats.read_bytes += s & Touched::kRead ? 32 : 0, stats.written_bytes += s & Touched::kWritten ? 32 : 0;
  }
}

// Which type each of the objects is, by the first one of it, and the counts of that type; before them what no object caused.
inline void reply_counts(std::vector<size_t> const& types) {
  write_all(&counts[0], sizeof counts[0]);
  for (size_t type : types) {
    int64_t const index = int64_t(type);
    write_all(&index, sizeof index);
    write_all(&counts[type], sizeof counts[type]);
  }
}

int serve(void (*call)(char const* packed), size_t bytes, std::initializer_list<void const*> objects) {
  reply_fd = dup(1);
  // What the kernel prints is no part of the reply.
  dup2(2, 1);
  setlinebuf(stdout);
  Request request;
  read_all(&request, sizeof request);
  alignas(64) static char packed[4096];
  if (request.packed_bytes != bytes) refuse("the kernel takes %zu bytes of arguments, the launch gives %zu", bytes, size_t(request.packed_bytes));
  read_all(packed, request.packed_bytes);
  auto const entries = read_many<ArrayEntry>(request.arrays);
  auto const pointers = read_many<PointerEntry>(request.pointers);
  gaps = read_many<Gap>(request.gaps);
  std::vector<Array> arrays;
  for (ArrayEntry const& e : entries) {
    arrays.push_back(read_array(e));
    global_arrays.push_back({arrays.back().data, arrays.back().bytes});
    if (VIDRIAL_ACCESSES) touched.emplace_back(arrays.back().data, e.bytes);
  }
  std::vector<size_t> types;
  for (void const* object : objects) {
    if (!index_of(object)) identities.push_back(object), counts.emplace_back();
    types.push_back(index_of(object));
  }
  for (PointerEntry const& p : pointers) {
    char* const address = arrays[p.array].data + p.delta;
    memcpy(packed + p.offset, &address, sizeof address);
  }
  gridDim = dim3(request.grid[0], request.grid[1], request.grid[2]);
  blockDim = dim3(request.block[0], request.block[1], request.block[2]);
  thread_count = int(blockDim.x * blockDim.y * blockDim.z);
  lazy = request.landing & 1, eager = request.landing & 2;
  order = Order(std::min(request.order, 2u));
  random_state = request.order;
  static auto const entry = call;
  thread_body = [] { entry(packed); };
  allocate_shared(request.shared_bytes);
  find_static_arrays();
  watch(request.timeout);
  run_grid(request);
  for (PointerEntry const& p : pointers) check_array(arrays[p.array], p.offset);
  count_bytes(arrays);
  begin_reply("");
  reply_counts(types);
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (!arrays[i].bytes || !memcmp(arrays[i].data, arrays[i].original.data(), arrays[i].bytes)) continue;
    int64_t const index = int64_t(i);
    write_all(&index, sizeof index);
    write_all(arrays[i].data, arrays[i].bytes);
  }
  _exit(0);
}

}  // namespace vidrial::host
