// The adjoint of the state behind every chunk: the forward scan (power_scan.cuh) in reverse, over the queries of all heads of a group.
//
//   L_{n-1} = 2^(a_end) L_n + sum_i 2^(a_i) r_i phi(q_i) dy_i^T        M_{n-1} = 2^(a_end) M_n - sum_i delta_i 2^(a_i) r_i q_i q_i^T
//
// n is the chunk of the tokens i; L_n is what the state behind it is worth to all later chunks, and of the last one to whoever asked for the state
// behind it, else 0. What a state before the first chunk is worth goes out in float, without the multiplicity's place in a snapshot. As there, a warp owns 64
// rows of L, or some of M, times `columns` columns in float over all chunks, and writes a bf16 snapshot for each chunk that has later ones:
// M [D][D] (if normalised), then pair tiles [64][E], those with I < J times 2: each of their products stands for two of the square.
#pragma once
#include "power_tokens.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/tile/mma.cuh>

namespace vidrial {

// The ring's work items: chunks from the last one down to the second, or to the first where a state lies before it, of each the heads of the group, of each the blocks of queries, with dy and
// what they weigh at their chunk's start.
template <class Tiles, class Args>
struct QueryStream {
  static constexpr int kTokens = Tiles::tokens;
  Args const& p;
  int thread, head, chunk, q_head = 0, block = 0;
  uint32_t weights;
  typename Tiles::CopyQ copy_q;
  typename Tiles::CopyG copy_dy;
  typename Tiles::Elem const *q, *dy;

  CUTE_DEVICE QueryStream(Args const& args, uint32_t smem, int thread, int head)
      : p(args), thread(thread), head(head), chunk(args.chunks - 1), weights(smem + Tiles::Smem::Weights),
        copy_q(first(args.q, args.q_stride), args.q_stride[1], smem + Tiles::Smem::Q, thread),
        copy_dy(first(args.dy, args.dy_stride), args.dy_stride[1], smem + Tiles::Smem::G, thread), q(copy_q.source), dy(copy_dy.source) {}

  // Blocks of a chunk's tokens that exist.
  CUTE_DEVICE int blocks(int n) const { return (min(p.chunk, p.t - n * p.chunk) + kTokens - 1) / kTokens; }
  CUTE_DEVICE void operator()(int, int stage) {
    if (chunk < (Tiles::enters ? 0 : 1)) return;
    int const t0 = chunk * p.chunk + block * kTokens;
    copy_q.source = q + t0 * p.q_stride[1] + q_head * p.q_stride[2];
    copy_dy.source = dy + t0 * p.dy_stride[1] + q_head * p.dy_stride[2];
    copy_q(stage * Tiles::Q::kBytes, p.t - t0);
    copy_dy(stage * Tiles::G::kBytes, p.t - t0);
    int64_t const row = (int64_t(head) * p.group + q_head) * p.padded + t0;
    copy_vectors(p.from_start + row, weights + stage * (kTokens * 8), thread, kTokens / 4);
    if (Tiles::keeps_z) copy_vectors(p.from_start_z + row, weights + stage * (kTokens * 8) + kTokens * 4, thread, kTokens / 4);
    if (++block < blocks(chunk)) return;
    block = 0;
    if (++q_head < p.group) return;
    q_head = 0;
    --chunk;
  }

 private:
  template <class T>
  CUTE_DEVICE T const* first(T const* x, int64_t const (&stride)[3]) const {
    return x + head / p.h * stride[0] + int64_t(head % p.h) * p.group * stride[2];
  }
};

template <class Tiles, class Args>
CUTE_DEVICE void power_back_scan(Args const& p) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using Mma = typename Tiles::State;
  using Smem = typename Tiles::Smem;
  constexpr int D = Tiles::d, E = Tiles::e, kTokens = Tiles::tokens, kColumns = Tiles::columns;
  constexpr int kBlocks = D / 8, kPairs = kBlocks * (kBlocks + 1) / 2, kStateUnits = kPairs * (E / kColumns);
  constexpr int kZRows = Tiles::z_rows, kZUnits = Tiles::keeps_z ? (D / kZRows) * (D / kColumns) : 0, kZSize = Tiles::keeps_z ? D * D : 0;
  VIDRIAL_SHARED_MEMORY(raw);

  // NOTE: through a shuffle, so that the compiler knows the warp's index to be uniform.
  int const thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0), head = blockIdx.y;
  int const unit = blockIdx.x * (Tiles::threads / 32) + warp;
  bool const is_z = unit >= kStateUnits, active = unit < kStateUnits + kZUnits, is_state = !is_z;
  int const in_kind = is_z ? (active ? unit - kStateUnits : 0) : unit;
  int const width = is_z ? D : E, column = in_kind % (width / kColumns) * kColumns, tile = in_kind / (width / kColumns);
  int2 const pair = is_z ? make_int2(0, 0) : block_pair(tile, kBlocks);

  uint32_t const smem = shared_address(raw), own = smem + Smem::Products + warp * Tiles::products_bytes, weights = smem + Smem::Weights;
  QueryStream<Tiles, Args> stream(p, smem, thread, head);
  typename Tiles::Tokens load_i(smem + Smem::Q, lane, 0, pair.x * 8), load_j(smem + Smem::Q, lane, 0, pair.y * 8);
  typename Tiles::Broadcast load_splat(own, lane, 0, 0);
  typename Mma::B load_dy(smem + Smem::G, lane, 0, is_z ? 0 : column);

  Fragment<Mma> acc = {};
  auto to_bf16 = [](uint32_t (&fb)[Mma::N][2]) {
    CUTE_UNROLL
    for (int n = 0; n < Mma::N; ++n) { fb[n][0] = Pair::to_bf16(fb[n][0]); fb[n][1] = Pair::to_bf16(fb[n][1]); }
  };
  // A block's part of a pair tile: q_J stays in registers, q_I, weighed, goes to the warp's own copy of q^T, from which it is broadcast.
  auto update_state = [&](int stage) {
    uint32_t qi[kTokens / 8], qj[kTokens / 8];
    CUTE_UNROLL
    for (int m = 0; m < kTokens / 8; m += 4) {
      load_i(stage * Tiles::Q::kBytes, m * 8, 0, qi[m], qi[m + 1], qi[m + 2], qi[m + 3]);
      load_j(stage * Tiles::Q::kBytes, m * 8, 0, qj[m], qj[m + 1], qj[m + 2], qj[m + 3]);
    }
    __syncwarp();                                  // the block before has been read
    CUTE_UNROLL
    for (int m = 0; m < kTokens / 8; ++m) {
      float2 const g = load_shared_float2(weights + stage * (kTokens * 8) + m * 32 + lane % 4 * 8);
      qj[m] = Pair::to_bf16(qj[m]);
      store_shared(own + Tiles::Products::offset(lane / 4, m * 8 + lane % 4 * 2), pack_bf16(Pair::low(qi[m]) * g.x, Pair::high(qi[m]) * g.y));
    }
    __syncwarp();
    CUTE_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t fa[4][4], fb[Mma::N][2];
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        load_splat(0, 2 * m, k * 16, fa[m][0], fa[m][1], fa[m][2], fa[m][3]);
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) fa[m][r] = multiply_bf16(fa[m][r], qj[2 * k + r / 2]);
      }
      load_dy.load(stage * Tiles::G::kBytes, k, fb);
      to_bf16(fb);
      Mma::multiply(acc.x, fa, fb);
    }
  };
  // And of rows of M: the A operand is q^T itself, weighed, the B operand the queries.
  auto update_z = [&](int stage) {
    using Z = typename Tiles::Z;
    typename Z::A load_rows(smem + Smem::Q, lane, 0, tile * kZRows);
    typename Z::B load_columns(smem + Smem::Q, lane, 0, column);
    CUTE_NO_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t fa[Z::M][4], fb[Z::N][2];
      load_rows.load(stage * Tiles::Q::kBytes, k, fa);
      load_columns.load(stage * Tiles::Q::kBytes, k, fb);
      to_bf16(fb);
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        float2 const g = load_shared_float2(weights + stage * (kTokens * 8) + kTokens * 4 + k * 64 + r / 2 * 32 + lane % 4 * 8);
        CUTE_UNROLL
        for (int m = 0; m < Z::M; ++m) fa[m][r] = pack_bf16(Pair::low(fa[m][r]) * g.x, Pair::high(fa[m][r]) * g.y);
      }
      Z::multiply(reinterpret_cast<float (&)[Z::M][Z::N][4]>(acc.x), fa, fb);
    }
  };

  // Where this thread's rows lie in a snapshot.
  int const rows = is_z ? kZRows : 64, own_row = Mma::row(lane);
  int const place = (is_z ? (tile * kZRows + own_row) * D : kZSize + (tile * 64 + own_row) * E) + column;
  float const count = is_z || pair.x == pair.y ? 1.f : 2.f;
  auto store = [&](int n) {
    cutlass::bfloat16_t* out = p.adjoint + (int64_t(head) * p.chunks + n) * Tiles::snapshot + place;
    CUTE_UNROLL
    for (int m = 0; m < Mma::M; ++m) {
      if (m * 16 >= rows) break;
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) store_row(out + Mma::row_of(m, 2 * h) * width, acc.x[m], h, count, Mma::N);
    }
  };
  // f(row, m, h) of this thread's rows in S or Z of a state, float.
  auto each_row = [&](auto* s, auto* z, auto&& f) {
    auto* first = is_z ? z + int64_t(head) * (D * D) + place : s + int64_t(head) * (kPairs * 64 * E) + place - kZSize;
    CUTE_UNROLL
    for (int m = 0; m < Mma::M; ++m) {
      if (m * 16 >= rows) break;
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) f(first + Mma::row_of(m, 2 * h) * width, m, h);
    }
  };
  if constexpr (Tiles::leaves) {
    if (active) {
      each_row(p.d_final_s, p.d_final_z, [&](float const* row, int m, int h) {
        CUTE_UNROLL
        for (int n = 0; n < Mma::N; ++n) {
          CUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            int const at = lane % 4 * 2 + n * 8 + i;
            float x = row[at];
            // Of Z the symmetric part counts.
            if (is_z) x = 0.5f * (x + p.d_final_z[(int64_t(head) * D + column + at) * D + tile * kZRows + own_row + Mma::row_of(m, 2 * h)]);
            acc.x[m][n][2 * h + i] = x / count;
          }
        }
      });
    }
  }
  typename Tiles::Ring ring;
  ring.first(stream);
  CUTE_NO_UNROLL
  for (int n = p.chunks - 1; n > (Tiles::enters ? -1 : 0); --n) {
    if (Tiles::leaves || n + 1 < p.chunks) {
      if (active) store(n);
      if constexpr (Tiles::gated) {
        float2 const total = p.a[int64_t(head) * p.padded + (n + 1) * p.chunk - 1];
        acc.scale(exp2_approx(total.x + total.y));
      }
    }
    CUTE_NO_UNROLL
    for (int block = p.group * stream.blocks(n); block > 0; --block) {
      int const stage = ring.next(stream);
      if (is_state) update_state(stage);
      else if (active) update_z(stage);
    }
  }
  if constexpr (Tiles::enters) {
    if (active) each_row(p.d_initial_s, p.d_initial_z, [&](float* row, int m, int h) { store_row(row, acc.x[m], h, count, Mma::N); });
  } else if (active && p.chunks > 0) {
    store(0);
  }
}

}  // namespace vidrial
