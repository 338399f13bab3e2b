// What a CTA of power_attend works on: a tile of queries of one head, the state before its chunk and the keys of the chunk up to its rows,
// and how these pass through the ring.
#pragma once
#include "power_gates.cuh"
#include <vidrial/pipeline/ring.cuh>
#include <vidrial/tile/copy.cuh>

namespace vidrial {

// The place of a tile of queries; blocks of keys are counted from the chunk's start.
template <class Tiles, class Args>
struct QueryTile {
  static constexpr int kRows = Tiles::rows, kKeys = Tiles::keys;
  static constexpr bool kGated = Tiles::gated;
  Args const& p;
  Sequence<Args> sequence;
  int thread, lane, warp, head, kv_head, m0, chunk, c0, first_diagonal_block, key_blocks;
  // NOTE: rows of the gates' tables fit an int, since the arrays have at most 2^31 elements; two pointers would be two registers more each.
  int gates;
  // r, the sum of the gates before the tile, and what the gates have forgotten by then: it is not read.
  float2 r0;
  float state_decay;
  bool has_state;
  int forgotten = 0;

  CUTE_DEVICE explicit QueryTile(Args const& args) : p(args), sequence{args, int(blockIdx.z) / args.h} {
    thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
    head = blockIdx.z, kv_head = head - sequence.batch * p.h;
    m0 = blockIdx.x * kRows, chunk = m0 / p.chunk, c0 = chunk * p.chunk;
    first_diagonal_block = (m0 - c0) / kKeys, key_blocks = (min(m0 + kRows, sequence.length()) - c0 + kKeys - 1) / kKeys;
    gates = head * p.chunks * p.chunk;
    // What the gates have forgotten altogether by the first query, the state or the first blocks of keys, weighs 0.
    r0 = kGated && m0 > c0 ? a(m0 - 1) : make_float2(0.f, 0.f);
    state_decay = kGated ? exp2_approx(r0.x + r0.y) : 1.f;
    has_state = Tiles::stateful && (Tiles::enters || chunk > 0) && state_decay > 0.f;
    if (kGated) {
      for (unsigned zeros = ~0u; forgotten < first_diagonal_block && zeros == ~0u;) {
        int const j = forgotten + lane;
        zeros = __ballot_sync(~0u, j < first_diagonal_block && exp2_approx(diff_split(r0, a(c0 + (j + 1) * kKeys - 1))) == 0.f);
        forgotten += zeros == ~0u ? 32 : __ffs(~zeros) - 1;
      }
    }
  }
  CUTE_DEVICE float2 a(int token) const { return p.a[gates + token]; }
  // Row `first` of the query head of this CTA in an array of them; `z`: blockIdx.z, from which the head is worked out.
  template <class T>
  CUTE_DEVICE T* at_head(T* x, int64_t const (&stride)[3], int first, int z) const {
    int const batch = z / p.h;
    return Sequence<Args>{p, batch}.at(x, stride, first, (z - batch * p.h) * gridDim.y + blockIdx.y);
  }
  // The band of rows that is multiplied together, by a warp or a warpgroup, ends before this.
  CUTE_DEVICE int band_end() const { return m0 + (warp / Tiles::warps_per_band + 1) * Tiles::rows_per_band; }
};

// The ring's work items: some rows of Z each, then some pair tiles of S, then blocks of keys and values with their decay.
template <class Tiles, class Args>
struct PowerStream {
  static constexpr int kKeys = Tiles::keys;
  QueryTile<Tiles, Args> const& tile;
  uint32_t decay;
  int state_stages;
  typename Tiles::CopyK copy_k;
  typename Tiles::CopyV copy_v;
  typename Tiles::CopyZ copy_z;
  typename Tiles::CopyS copy_s;

  CUTE_DEVICE PowerStream(QueryTile<Tiles, Args> const& tile, uint32_t ring, uint32_t decay)
      : tile(tile), decay(decay), state_stages(tile.has_state ? Tiles::z_stages + Tiles::s_stages : 0),
        copy_k(first(tile.p.k, tile.p.k_stride), tile.p.k_stride[1], ring, tile.thread),
        copy_v(first(tile.p.v, tile.p.v_stride), tile.p.v_stride[1], ring + Tiles::K::kBytes, tile.thread),
        copy_z(snapshot(), Tiles::d, ring, tile.thread),
        copy_s(snapshot() + (Tiles::keeps_z ? Tiles::d * Tiles::d : 0), Tiles::e, ring, tile.thread) {}

  // `State`: whether it may still be a part of the state; false costs neither instructions nor registers.
  template <bool State>
  CUTE_DEVICE void fetch(int item, int stage) {
    auto const& p = tile.p;
    uint32_t const at = stage * Tiles::stage_bytes;
    if (State && item < state_stages) {
      if (item < Tiles::z_stages) { copy_z.full(at); copy_z.source += Tiles::z_rows * Tiles::d; }
      else { copy_s.full(at); copy_s.source += Tiles::s_tiles * 64 * Tiles::e; }
    } else if (int const j = tile.forgotten + item - state_stages; j < tile.key_blocks) {
      int const j0 = tile.c0 + j * kKeys;
      copy_k(at, tile.sequence.length() - j0); copy_k.source += kKeys * p.k_stride[1];
      copy_v(at, tile.sequence.length() - j0); copy_v.source += kKeys * p.v_stride[1];
      if (Tiles::gated) {
        bool const diagonal = j >= tile.first_diagonal_block;
        void const* source = diagonal ? static_cast<void const*>(p.a + tile.gates + j0) : static_cast<void const*>(p.to_block + tile.gates + j0);
        copy_vectors(source, decay + stage * (kKeys * 8), tile.thread, diagonal ? kKeys / 2 : kKeys / 4);
      }
    }
  }

 private:
  template <class T>
  CUTE_DEVICE T const* first(T const* x, int64_t const (&stride)[3]) const {
    return tile.sequence.at(x, stride, tile.c0 + tile.forgotten * kKeys, tile.kv_head);
  }
  CUTE_DEVICE cutlass::bfloat16_t const* snapshot() const { return tile.p.snapshots + (int64_t(tile.head) * tile.p.chunks + tile.chunk) * Tiles::snapshot; }
};

}  // namespace vidrial
