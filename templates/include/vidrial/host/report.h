// How a launch ends: a reply on the pipe, then exit. A failure names the block, the thread and program counters, which the caller
// turns into lines of the kernel.
#pragma once
#include <execinfo.h>
#include <unistd.h>
#include <cstdarg>
#include <string>
#include <vidrial/host/runtime.h>
#include <vidrial/host/sanitizer.h>

extern "C" char const __executable_start;

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace vidrial::host {

// Of the whole launch. NOTE: vidrial.host.target unpacks these fields in the same order.
struct Stats {
  int64_t switches, shared_memory_high_water, read_bytes, written_bytes;
  double seconds;
};
inline Stats stats{};
inline int reply_fd = 1;

inline void write_all(void const* data, size_t bytes) {
  for (char const* p = static_cast<char const*>(data); bytes;) {
    ssize_t const n = write(reply_fd, p, bytes);
    if (n <= 0) _exit(3);
    p += n; bytes -= size_t(n);
  }
}

inline void begin_reply(char const* failure) {
  fflush(stdout);
  int64_t const length = int64_t(strlen(failure));
  write_all(&stats, sizeof stats);
  write_all(&length, sizeof length);
  write_all(failure, size_t(length));
}

// A return address as the caller's tools understand it: the call before it, relative to the executable's first byte.
inline unsigned long place(void const* return_address) {
  return static_cast<unsigned long>(static_cast<char const*>(return_address) - 1 - &__executable_start);
}

// The instruction that a signal came at; the stack above it cannot always be followed.
inline void const* interrupted_at = nullptr;

inline void describe_stack(char* text, size_t bytes) {
  void* frames[24];
  int const n = backtrace(frames, 24);
  size_t used = size_t(snprintf(text, bytes, "<stack"));
  if (interrupted_at) used += size_t(snprintf(text + used, bytes - used, " %lx", place(interrupted_at) + 1));
  for (int i = 0; i < n && used < bytes; ++i) used += size_t(snprintf(text + used, bytes - used, " %lx", place(frames[i])));
  if (used < bytes) snprintf(text + used, bytes - used, ">");
}

inline constexpr int kTextBytes = 16384, kReasonBytes = 8192;

void fatal(char const* format, ...) {
  static char text[kTextBytes];
  int n = snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  va_list arguments;
  va_start(arguments, format);
  n += std::min(vsnprintf(text + n, kReasonBytes, format, arguments), kReasonBytes - 1);
  va_end(arguments);
  describe_stack(text + n, sizeof text - size_t(n));
  begin_reply(text);
  _exit(0);
}

// What is found before the kernel runs, or after a CTA has ended.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void refuse(char const* format, ...) {
  static char text[kReasonBytes];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  begin_reply(text);
  _exit(0);
}

}  // namespace vidrial::host

// Sanitizers know threads of the process, not of the CUDA block.
namespace vidrial::host {
inline void say_thread() {
  fprintf(stderr, "VIDRIAL block (%u, %u, %u), thread (%u, %u, %u)\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
}
}  // namespace vidrial::host
#if VIDRIAL_ASAN
extern "C" void __asan_on_error() { vidrial::host::say_thread(); }
extern "C" char const* __asan_default_options() { return "detect_leaks=0:detect_stack_use_after_return=0:exitcode=99:handle_abort=1"; }
#endif
#if VIDRIAL_TSAN
extern "C" void __tsan_on_report(void*) { vidrial::host::say_thread(); }
extern "C" char const* __tsan_default_options() { return "halt_on_error=1:exitcode=99:report_signal_unsafe=0:atexit_sleep_ms=0"; }
#endif
extern "C" char const* __ubsan_default_options() { return "print_stacktrace=1:halt_on_error=1:exitcode=99"; }
