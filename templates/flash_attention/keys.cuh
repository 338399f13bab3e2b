// Which keys a query sees. Query i stands at key i + tk - tq; rows are queries of `pack` heads side by side, row r query r / pack.
#pragma once
#include <vidrial/arch/ptx.cuh>

namespace vidrial {

template <class Tiles>
struct VisibleKeys {
  static constexpr bool kRight = Tiles::causal || Tiles::windowed, kLeft = Tiles::windowed;
  int offset, tk, left, right;
  template <class Args>
  CUTE_DEVICE explicit VisibleKeys(Args const& p) : offset(p.tk - p.tq), tk(p.tk), left(p.left), right(Tiles::windowed ? p.right : 0) {}
  // Query i sees keys [begin(i), end(i)).
  CUTE_DEVICE int begin(int query) const { return kLeft ? query + offset - left : 0; }
  CUTE_DEVICE int end(int query) const { return kRight ? min(tk, query + offset + 1 + right) : tk; }
};

// Blocks of keys [begin, end) that some of the queries [first, last] see; all of them see all keys of those in [low, high).
template <int Keys>
struct KeyBlocks {
  int begin, end, low, high;
  template <class Visible>
  CUTE_DEVICE KeyBlocks(Visible const& visible, int first, int last) {
    end = first > last ? 0 : (max(visible.end(last), 0) + Keys - 1) / Keys;
    begin = Visible::kLeft ? min(max(visible.begin(first), 0) / Keys, end) : 0;
    low = Visible::kLeft ? (max(visible.begin(last), 0) + Keys - 1) / Keys : 0;
    high = max(visible.end(first), 0) / Keys;
  }
  // Those of them that lie in `all`; none where the rows do not exist.
  CUTE_DEVICE KeyBlocks within(KeyBlocks const& all) const {
    KeyBlocks r = *this;
    r.end = max(min(end, all.end), all.begin);
    r.begin = max(min(begin, r.end), all.begin);
    return r;
  }
};

}  // namespace vidrial
