// What the two scans of power retention share: a segment of the sequence, its tokens on their way through the ring, and how rows of the
// state reach memory. There, too: the order of pair tiles.
#pragma once
#include "power_gates.cuh"
#include <vidrial/pipeline/ring.cuh>
#include <vidrial/tile/copy.cuh>
#include <vidrial/tile/fragment.cuh>

namespace vidrial {

// The chunks [first, last) of the segment blockIdx.y, and the blocks of tokens in them.
template <class Tiles, class Args>
struct Segment {
  Args const& p;
  Sequence<Args> sequence;
  int head, chunks, first, last, blocks;
  CUTE_DEVICE explicit Segment(Args const& args) : p(args), sequence{args, int(blockIdx.z) / args.h} {
    head = blockIdx.z, chunks = (sequence.length() + p.chunk - 1) / p.chunk;
    int const per_segment = (chunks + gridDim.y - 1) / gridDim.y;
    first = blockIdx.y * per_segment, last = min(first + per_segment, chunks);
    // The last chunk of all updates nothing unless a state is asked for behind it. So else every token read here exists.
    blocks = (min(last, chunks - 1) - first) * blocks_per_chunk();
    if (Tiles::leaves && last == chunks) blocks += blocks_of(chunks - 1);
  }
  CUTE_DEVICE int blocks_per_chunk() const { return p.chunk / Tiles::tokens; }
  CUTE_DEVICE int blocks_of(int n) const {
    if (!Tiles::leaves || n + 1 < chunks) return blocks_per_chunk();
    return (sequence.length() - n * p.chunk + Tiles::tokens - 1) / Tiles::tokens;
  }
  // Whether what a segment adds is asked for behind it.
  CUTE_DEVICE bool has_end() const { return Tiles::leaves || last < chunks; }
  // Before chunk n: what the state up to the chunk before it still counts.
  CUTE_DEVICE float decay(int n) const {
    float2 const total = p.a[(head * chunks + n + 1) * p.chunk - 1];
    return exp2_approx(total.x + total.y);
  }
  CUTE_DEVICE cutlass::bfloat16_t* snapshot(int n, int size) const { return p.snapshots + int64_t(head * chunks + n) * size; }
  CUTE_DEVICE float* end(int size) const { return p.ends + (int64_t(head) * (gridDim.y - (Tiles::leaves ? 0 : 1)) + blockIdx.y) * size; }
};

// The ring's work items: a block of keys and values each, with their decay to the end of their chunk.
template <class Tiles, class Args>
struct TokenStream {
  static constexpr int kTokens = Tiles::tokens;
  Segment<Tiles, Args> const& segment;
  uint32_t decay;
  int thread, row;
  typename Tiles::CopyK copy_k;
  typename Tiles::CopyV copy_v;

  CUTE_DEVICE TokenStream(Segment<Tiles, Args> const& segment, uint32_t smem, int thread)
      : segment(segment), decay(smem + Tiles::Smem::Decay), thread(thread),
        // NOTE: rows of the gates' tables fit an int, since the arrays have at most 2^31 elements; 64-bit indices cost the inner loop a spill.
        row((segment.head * segment.chunks + segment.first) * segment.p.chunk),
        copy_k(first(segment.p.k, segment.p.k_stride), segment.p.k_stride[1], smem + Tiles::Smem::K, thread),
        copy_v(first(segment.p.v, segment.p.v_stride), segment.p.v_stride[1], smem + Tiles::Smem::V, thread) {}

  CUTE_DEVICE void operator()(int block, int stage) {
    auto const& p = segment.p;
    if (block < segment.blocks) {
      if constexpr (Tiles::leaves) {
        int const rows = segment.sequence.length() - segment.first * p.chunk - block * kTokens;
        copy_k(stage * Tiles::K::kBytes, rows);
        copy_v(stage * Tiles::V::kBytes, rows);
      } else {
        copy_k.full(stage * Tiles::K::kBytes);
        copy_v.full(stage * Tiles::V::kBytes);
      }
      copy_k.source += kTokens * p.k_stride[1]; copy_v.source += kTokens * p.v_stride[1];
      if (Tiles::gated) copy_vectors(p.to_end + row + block * kTokens, decay + stage * (kTokens * 4), thread, kTokens / 4);
    }
  }

 private:
  template <class T>
  CUTE_DEVICE T const* first(T const* x, int64_t const (&stride)[3]) const {
    return segment.sequence.at(x, stride, int64_t(segment.first) * segment.p.chunk, segment.head % segment.p.h);
  }
};

// Pair p of the lexicographic list of (I <= J) over n blocks.
CUTE_DEVICE int2 block_pair(int p, int n) {
  int i = 0;
  while (p >= n - i) { p -= n - i; ++i; }
  return make_int2(i, i + p);
}

// Of 32 columns of a row the threads t % 4 hold 2 t, 2 t + 1 of each of four atoms, a word each. A transposition of 4 x 4 among them gives
// thread t the 8 columns of atom t, which it stores at once.
CUTE_DEVICE uint4 gather_columns(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  // With the thread whose number differs in one bit: its half of what this one does not keep.
  auto exchange = [](bool upper, int bit, uint32_t& low, uint32_t& high) {
    uint32_t const got = __shfl_xor_sync(~0u, upper ? low : high, bit);
    low = upper ? got : low;
    high = upper ? high : got;
  };
  bool const first = threadIdx.x & 1, second = threadIdx.x & 2;
  exchange(first, 1, a, b);
  exchange(first, 1, c, d);
  exchange(second, 2, a, c);
  exchange(second, 2, b, d);
  return make_uint4(a, b, c, d);
}

// The row `h` of some accumulators, times `count`, into a snapshot's row, of which they are `atoms` times 8 columns.
template <int N>
CUTE_DEVICE void store_row(cutlass::bfloat16_t* row, float const (&x)[N][4], int h, float count, int atoms) {
  cutlass::bfloat16_t* out = row + threadIdx.x % 4 * 8;
  CUTE_UNROLL
  for (int j = 0; j < N; j += 4) {
    if (j >= atoms) break;
    auto pair_of = [&](int i) { return pack_bf16(count * x[j + i][2 * h], count * x[j + i][2 * h + 1]); };
    *reinterpret_cast<uint4*>(out + j * 8) = gather_columns(pair_of(0), pair_of(1), pair_of(2), pair_of(3));
  }
}
// And into what a segment leaves to the next ones.
template <int N>
CUTE_DEVICE void store_row(float* row, float const (&x)[N][4], int h, float count, int atoms) {
  float* out = row + threadIdx.x % 4 * 2;
  CUTE_UNROLL
  for (int j = 0; j < N; ++j) {
    if (j >= atoms) break;
    *reinterpret_cast<float2*>(out + j * 8) = make_float2(count * x[j][2 * h], count * x[j][2 * h + 1]);
  }
}

}  // namespace vidrial
