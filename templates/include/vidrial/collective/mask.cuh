// Which keys a query sees: rules for single keys, and for whole blocks of them. Rows and keys are numbered from the same origin.
#pragma once

namespace vidrial {

// A rule says of each row which keys it sees, [begin(row), end(row)); neither falls from one row to the next.
struct Causal {
  CUTE_HOST_DEVICE bool allows(int row, int key) const { return key <= row; }
  CUTE_HOST_DEVICE int begin(int) const { return 0; }
  CUTE_HOST_DEVICE int end(int row) const { return row + 1; }
};

// The last `keys` keys up to a row's own.
struct Window {
  int keys;
  CUTE_HOST_DEVICE bool allows(int row, int key) const { return key <= row && row - key < keys; }
  CUTE_HOST_DEVICE int begin(int row) const { return row < keys ? 0 : row - keys + 1; }
  CUTE_HOST_DEVICE int end(int row) const { return row + 1; }
};

// Keys that exist: the first `keys`.
struct Tail {
  int keys;
  CUTE_HOST_DEVICE bool allows(int, int key) const { return key < keys; }
  CUTE_HOST_DEVICE int begin(int) const { return 0; }
  CUTE_HOST_DEVICE int end(int) const { return keys; }
};

// What both rules allow.
template <class A, class B>
struct Both {
  A a; B b;
  CUTE_HOST_DEVICE bool allows(int row, int key) const { return a.allows(row, key) && b.allows(row, key); }
  CUTE_HOST_DEVICE int begin(int row) const { return a.begin(row) > b.begin(row) ? a.begin(row) : b.begin(row); }
  CUTE_HOST_DEVICE int end(int row) const { return a.end(row) < b.end(row) ? a.end(row) : b.end(row); }
};

// Blocks of `Keys` keys for the rows `first` to `last`: some row sees something of [from, to), every row all of [whole_from, whole_to).
template <int Keys>
struct KeyBlocks {
  int from, whole_from, whole_to, to;
  template <class Rule>
  CUTE_HOST_DEVICE KeyBlocks(Rule const& rule, int first, int last) {
    from = rule.begin(first) / Keys;
    to = (rule.end(last) + Keys - 1) / Keys;
    if (to < from) to = from;
    whole_from = (rule.begin(last) + Keys - 1) / Keys;
    if (whole_from > to) whole_from = to;
    whole_to = rule.end(first) / Keys;
    if (whole_to < whole_from) whole_to = whole_from;
  }
};

// Of which blocks a loop asks single keys: of none, of all, or of those from `first` on, known at run time only.
struct NoneMasked { CUTE_HOST_DEVICE static constexpr bool masked(int) { return false; } };
struct AllMasked { CUTE_HOST_DEVICE static constexpr bool masked(int) { return true; } };
struct MaskedFrom {
  int first;
  CUTE_HOST_DEVICE bool masked(int block) const { return block >= first; }
};

}  // namespace vidrial
