// What a CuTe layout type of constants says, worked out directly.
// NOTE: CuTe's own evaluation gives the same offsets (tests/layout/test_cute_agreement.py) but is a third of a kernel's compile time.
#pragma once

namespace vidrial {

// One mode: coordinate -> offset. A coordinate of a nested mode runs through its parts, the first one fastest.
template <class Shape, class Stride> struct Mode;

template <auto N, auto D>
struct Mode<cute::C<N>, cute::C<D>> {
  static constexpr int size = N, last = (N - 1) * D;
  CUTE_HOST_DEVICE static constexpr int at(int i) { return i * D; }
};

template <class N, class D>
struct Mode<cute::tuple<N>, cute::tuple<D>> : Mode<N, D> {};

template <class N0, class N1, class... N, class D0, class D1, class... D>
struct Mode<cute::tuple<N0, N1, N...>, cute::tuple<D0, D1, D...>> {
  using First = Mode<N0, D0>;
  using Rest = Mode<cute::tuple<N1, N...>, cute::tuple<D1, D...>>;
  static constexpr int size = First::size * Rest::size, last = First::last + Rest::last;
  CUTE_HOST_DEVICE static constexpr int at(int i) { return First::at(i % First::size) + Rest::at(i / First::size); }
};

// thread -> row or column.
template <class Layout> struct ThreadMap;
template <class Shape, class Stride>
struct ThreadMap<cute::Layout<Shape, Stride>> : Mode<Shape, Stride> {};

// (row, column) -> element; `size` elements from the first to the last.
template <class Layout> struct Plane;
template <class R, class C, class DR, class DC>
struct Plane<cute::Layout<cute::tuple<R, C>, cute::tuple<DR, DC>>> {
  static constexpr int size = Mode<R, DR>::last + Mode<C, DC>::last + 1;
  CUTE_HOST_DEVICE static constexpr int at(int row, int column) { return Mode<R, DR>::at(row) + Mode<C, DC>::at(column); }
};

}  // namespace vidrial
