// A kernel's parameters, taken from the bytes of a struct of them.
#pragma once
#include <array>
#include <type_traits>
#include <utility>
#include <vidrial/host/runtime.h>

namespace vidrial::host {

// Where each parameter lies, and the size of them all.
template <class... P>
constexpr std::array<size_t, sizeof...(P) + 1> parameter_offsets() {
  std::array<size_t, sizeof...(P) + 1> offsets{};
  size_t const sizes[] = {sizeof(P)..., 0}, alignments[] = {alignof(P)..., 1};
  size_t end = 0, widest = 1;
  for (size_t i = 0; i < sizeof...(P); ++i) {
    offsets[i] = (end + alignments[i] - 1) / alignments[i] * alignments[i];
    end = offsets[i] + sizes[i];
    widest = std::max(widest, alignments[i]);
  }
  offsets[sizeof...(P)] = (end + widest - 1) / widest * widest;
  return offsets;
}

template <class F> struct Entry;
template <class... P>
struct Entry<void (*)(P...)> {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters are passed by their bytes");
  static constexpr auto kOffsets = parameter_offsets<P...>();
  template <auto Kernel, size_t... I>
  static void call(char const* packed, std::index_sequence<I...>) { Kernel(*reinterpret_cast<P const*>(packed + kOffsets[I])...); }
  template <auto Kernel>
  static void call(char const* packed) { call<Kernel>(packed, std::index_sequence_for<P...>{}); }
};

template <auto Kernel, class... Objects>
int serve() {
  using E = Entry<decltype(Kernel)>;
  return serve(&E::template call<Kernel>, E::kOffsets.back(), {&identity<Objects>...});
}

}  // namespace vidrial::host
