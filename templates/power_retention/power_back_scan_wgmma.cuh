// The adjoint of the state behind every chunk (power_back_scan.cuh: the recurrence), by the forward scan's own kernel (power_scan_wgmma.cuh): q for
// k, dy for v, what the rows weigh for the decay, and chunks from the last one down.
#pragma once
#include "power_scan_wgmma.cuh"

namespace vidrial {

// The forward scan's Tiles for the adjoint: tokens are weighed whether there are gates or not.
template <class Inner>
struct Reversed : Inner { static constexpr bool gated = true; };

// The steps [first, last) of the segment blockIdx.y: step n is the chunk chunks - 1 - n.
template <class Inner, class Args>
struct Segment<Reversed<Inner>, Args> {
  Args const& p;
  int head, chunks, first, last, blocks;
  CUTE_DEVICE explicit Segment(Args const& args) : p(args), head(blockIdx.z), chunks(args.chunks) {
    int const per_segment = (chunks + gridDim.y - 1) / gridDim.y;
    first = blockIdx.y * per_segment, last = min(first + per_segment, chunks);
    // The first chunk of all updates nothing: no adjoint is asked for before it.
    blocks = (min(last, chunks - 1) - first) * blocks_per_chunk();
  }
  // Of all heads of the group. NOTE: those beyond the end of the last chunk weigh nothing.
  CUTE_DEVICE int blocks_per_chunk() const { return p.group * (p.chunk / Inner::tokens); }
  CUTE_DEVICE int blocks_of(int) const { return blocks_per_chunk(); }
  CUTE_DEVICE bool has_end() const { return last < chunks; }
  CUTE_DEVICE float decay(int n) const {
    if (!Inner::gated) return 1.f;
    float2 const total = p.a[(head * chunks + chunks - n) * p.chunk - 1];
    return exp2_approx(total.x + total.y);
  }
  CUTE_DEVICE cutlass::bfloat16_t* snapshot(int n, int size) const { return p.adjoint + int64_t(head * chunks + chunks - 1 - n) * size; }
  CUTE_DEVICE float* end(int size) const { return p.ends + (int64_t(head) * (gridDim.y - 1) + blockIdx.y) * size; }
};

// The ring's work items: of each chunk the heads of the group, of each the blocks of queries and dy, with what they weigh at their chunk's start.
template <class Inner, class Args>
struct TokenStream<Reversed<Inner>, Args> {
  static constexpr int kTokens = Inner::tokens;
  using Segment = vidrial::Segment<Reversed<Inner>, Args>;
  Segment const& segment;
  uint32_t smem;
  int thread, chunk, head = 0, block = 0;

  CUTE_DEVICE TokenStream(Segment const& segment, uint32_t smem, int thread)
      : segment(segment), smem(smem), thread(thread), chunk(segment.chunks - 1 - segment.first) {}

  CUTE_DEVICE void operator()(int item, int stage) {
    auto const& p = segment.p;
    if (item >= segment.blocks) return;
    int const t0 = chunk * p.chunk + block * kTokens, q_head = segment.head % p.h * p.group + head, batch = segment.head / p.h;
    auto at = [&](auto* x, int64_t const (&stride)[3]) { return x + batch * stride[0] + t0 * stride[1] + q_head * stride[2]; };
    typename Inner::CopyK(at(p.q, p.q_stride), p.q_stride[1], smem + Inner::Smem::K, thread)(stage * Inner::K::kBytes, p.t - t0);
    typename Inner::CopyV(at(p.dy, p.dy_stride), p.dy_stride[1], smem + Inner::Smem::V, thread)(stage * Inner::V::kBytes, p.t - t0);
    // Of a CTA's warpgroups all have pair tiles, or all have rows of M.
    float const* weights = blockIdx.x * (Inner::threads / 128) < Inner::state_units ? p.from_start : p.from_start_z;
    int const row = (segment.head * p.group + head) * p.padded + t0;
    copy_vectors(weights + row, smem + Inner::Smem::Decay + stage * (kTokens * 4), thread, kTokens / 4);
    if (++block < p.chunk / kTokens) return;
    block = 0;
    if (++head < p.group) return;
    head = 0;
    --chunk;
  }
};

}  // namespace vidrial
