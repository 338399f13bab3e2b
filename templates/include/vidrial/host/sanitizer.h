// What AddressSanitizer and ThreadSanitizer have to be told about fibers. Without a sanitizer everything here is empty.
#pragma once
#include <cstddef>

// VIDRIAL_ASAN or VIDRIAL_TSAN is 1 if the kernel is compiled with that sanitizer; the runtime itself never is.
#if VIDRIAL_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if VIDRIAL_TSAN
#include <sanitizer/tsan_interface.h>
// What the compiler calls at both ends of an instrumented function.
extern "C" void __tsan_func_entry(void* caller);
extern "C" void __tsan_func_exit();
// By which a thread's accesses are left out.
extern "C" void AnnotateIgnoreReadsBegin(char const* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(char const* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(char const* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(char const* file, int line);
#endif

namespace vidrial::host {

#if VIDRIAL_ASAN
struct StackInfo { void* fake = nullptr; void const* bottom = nullptr; size_t bytes = 0; };
inline void before_switch(StackInfo& from, StackInfo const& to, bool dying) { __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake, to.bottom, to.bytes); }
inline void after_switch(StackInfo& self) { __sanitizer_finish_switch_fiber(self.fake, nullptr, nullptr); }
// The stack that a fiber was first entered from is the main one, whose bounds only the sanitizer knows.
inline void first_entry(StackInfo& main) {
  void const* bottom; size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!main.bottom) main.bottom = bottom, main.bytes = bytes;
}
inline void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
struct StackInfo { void const* bottom = nullptr; size_t bytes = 0; };
inline void before_switch(StackInfo&, StackInfo const&, bool) {}
inline void after_switch(StackInfo&) {}
inline void first_entry(StackInfo&) {}
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

#if VIDRIAL_TSAN
inline void* race_context() { return __tsan_get_current_fiber(); }
inline void* new_race_context(char const* name) { void* f = __tsan_create_fiber(0); __tsan_set_fiber_name(f, name); return f; }
// A switch orders nothing: only barriers do, by `publish` before and `observe` after.
inline void enter_race_context(void* f) { __tsan_switch_to_fiber(f, __tsan_switch_to_fiber_no_sync); }
inline void publish(void* key) { __tsan_release(key); }
inline void observe(void* key) { __tsan_acquire(key); }
// While it lives, what the runtime reads and writes is reported at `caller`, a place in the kernel.
struct OnBehalfOf {
  explicit OnBehalfOf(void* caller) { __tsan_func_entry(caller); }
  ~OnBehalfOf() { __tsan_func_exit(); }
};
inline void ignore_accesses() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
inline void watch_accesses() { AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0); }
#else
inline void* race_context() { return nullptr; }
inline void* new_race_context(char const*) { return nullptr; }
inline void enter_race_context(void*) {}
inline void publish(void*) {}
inline void observe(void*) {}
struct OnBehalfOf { explicit OnBehalfOf(void*) {} };
inline void ignore_accesses() {}
inline void watch_accesses() {}
#endif

// While it lives, this thread's accesses are the runtime's own, which need no barriers. NOTE: sanitizers watch what the C++ library calls.
struct Unwatched {
  Unwatched() { ignore_accesses(); }
  ~Unwatched() { watch_accesses(); }
};
// Within it, what the runtime does in the kernel's stead.
struct Watched {
  explicit Watched(void* caller) : kernel((watch_accesses(), caller)) {}
  ~Watched() { ignore_accesses(); }
  OnBehalfOf const kernel;
};

}  // namespace vidrial::host
