// The symmetric square of D features in tiles of 64 products, without doubles: (q . k)^2 is the sum over these rows.
//
//   pairs    blocks I < J of 8 features:       row 8 i + j is x_{8I+i} x_{8J+j}, which counts twice
//   merged   diagonal blocks A = 2m, B = 2m+1: row 8 i + j is A's product where j >= i, B's where j < i; twice, if i != j
//   squares  of the odd blocks' features, which the merged tiles left out: row r is x_{8 (2 (r / 8) + 1) + r % 8} squared
//
// 33 tiles instead of 36 for D = 64, 129 instead of 136 for D = 128.
#pragma once

namespace vidrial {

template <int D>
struct StateTiles {
  static constexpr int kBlocks = D / 8, kPairs = kBlocks * (kBlocks - 1) / 2, kMerged = kBlocks / 2, kAll = kPairs + kMerged + 1;
  static_assert(D % 32 == 0 && D <= 128, "the squares fill whole fragments of one tile");
  static constexpr int kSquareAtoms = D / 32;   // fragments of 16 squares

  CUTE_HOST_DEVICE static bool is_merged(int tile) { return tile >= kPairs && tile < kPairs + kMerged; }
  CUTE_HOST_DEVICE static bool is_squares(int tile) { return tile == kPairs + kMerged; }
  // The two blocks of a tile; pairs are in lexicographic order.
  CUTE_DEVICE static int2 blocks(int tile) {
    if (tile >= kPairs) return is_merged(tile) ? make_int2(2 * (tile - kPairs), 2 * (tile - kPairs) + 1) : make_int2(0, 0);
    int i = 0;
    while (tile >= kBlocks - 1 - i) { tile -= kBlocks - 1 - i; ++i; }
    return make_int2(i, i + 1 + tile);
  }
};

}  // namespace vidrial
