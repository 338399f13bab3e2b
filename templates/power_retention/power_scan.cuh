// The state of power retention before every chunk: a scan that keeps the state in registers.
//
//   S_{n+1} = 2^(a_end) S_n + sum_t to_end_t phi(k_t) v_t^T        Z_{n+1} = 2^(a_end) Z_n + sum_t to_end_t k_t k_t^T
//
// phi(k) has one 8 x 8 tile of products k_i k_j a pair of blocks (I <= J) of 8 features. A warp owns 64 rows of the state, one pair
// tile (or some rows of Z), times `columns` columns of V, in float over all chunks of its segment; before each chunk it writes a bf16
// snapshot. phi is made in registers: k_j^T comes by ldmatrix.trans, k_i by a *broadcast* ldmatrix of a warp-private copy of k^T, so
// that one load is the k_i of a whole fragment.
//
// Snapshot of (head, chunk): Z [D][D] (if normalised), then pair tiles [64][E], (I, J) lexicographic, row 8 (i % 8) + j % 8, those with
// I < J times 2: each of their products stands for two of the square.
#pragma once
#include "power_tokens.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/tile/mma.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_scan(Args const& p) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using Mma = typename Tiles::State;
  using Smem = typename Tiles::Smem;
  constexpr int D = Tiles::d, E = Tiles::e, kTokens = Tiles::tokens, kColumns = Tiles::columns;
  constexpr int kBlocks = D / 8, kPairs = kBlocks * (kBlocks + 1) / 2, kStateUnits = kPairs * (E / kColumns);
  constexpr int kZRows = Tiles::z_rows, kZUnits = Tiles::keeps_z ? (D / kZRows) * (D / kColumns) : 0;
  constexpr int kZSize = Tiles::keeps_z ? D * D : 0, kSnapshot = kZSize + kPairs * 64 * E;
  constexpr int kWarps = Tiles::threads / 32;
  VIDRIAL_SHARED_MEMORY(raw);

  // NOTE: through a shuffle, so that the compiler knows the warp's index to be uniform.
  int const thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  int const unit = blockIdx.x * kWarps + warp;
  bool const is_z = unit >= kStateUnits, active = unit < kStateUnits + kZUnits;
  int const in_kind = is_z ? (active ? unit - kStateUnits : 0) : unit;
  int const width = is_z ? D : E, column = in_kind % (width / kColumns) * kColumns, tile = in_kind / (width / kColumns);
  int2 const pair = is_z ? make_int2(0, 0) : block_pair(tile, kBlocks);

  Segment<Tiles, Args> const segment(p);
  if (segment.first >= segment.last) return;

  uint32_t const smem = shared_address(raw), own = smem + Smem::Products + warp * Tiles::products_bytes;
  TokenStream<Tiles, Args> stream(segment, smem, thread);
  typename Tiles::Tokens load_i(smem + Smem::K, lane, 0, pair.x * 8), load_j(smem + Smem::K, lane, 0, pair.y * 8);
  typename Tiles::Broadcast load_splat(own, lane, 0, 0);
  typename Mma::B load_v(smem + Smem::V, lane, 0, is_z ? 0 : column);

  Fragment<Mma> acc = {};
  auto to_bf16 = [](uint32_t (&fb)[Mma::N][2]) {
    CUTE_UNROLL
    for (int n = 0; n < Mma::N; ++n) { fb[n][0] = Pair::to_bf16(fb[n][0]); fb[n][1] = Pair::to_bf16(fb[n][1]); }
  };
  // A pair tile's factors for one block of tokens: k_j stays in registers, k_i goes to the warp's own copy of k^T. They are fetched
  // one block ahead, so that nothing waits for them.
  uint32_t kj[kTokens / 8];
  auto load_factors = [&](int stage, int half) {
    uint32_t ki[kTokens / 8];
    CUTE_UNROLL
    for (int m = 0; m < kTokens / 8; m += 4) {
      load_i(stage * Tiles::K::kBytes, m * 8, 0, ki[m], ki[m + 1], ki[m + 2], ki[m + 3]);
      load_j(stage * Tiles::K::kBytes, m * 8, 0, kj[m], kj[m + 1], kj[m + 2], kj[m + 3]);
    }
    CUTE_UNROLL
    for (int m = 0; m < kTokens / 8; ++m) {
      kj[m] = Pair::to_bf16(kj[m]);
      ki[m] = Pair::to_bf16(ki[m]);
      if (Tiles::gated) {
        float2 const g = load_shared_float2(smem + Smem::Decay + stage * (kTokens * 4) + m * 32 + lane % 4 * 8);
        ki[m] = scale_bf16(ki[m], g.x, g.y);
      }
      store_shared(own + half * Tiles::Products::kBytes + Tiles::Products::offset(lane / 4, m * 8 + lane % 4 * 2), ki[m]);
    }
    __syncwarp();
  };
  auto update_state = [&](int stage, int half) {
    CUTE_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t fa[4][4], fb[Mma::N][2];
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        load_splat(half * Tiles::Products::kBytes, 2 * m, k * 16, fa[m][0], fa[m][1], fa[m][2], fa[m][3]);
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) fa[m][r] = multiply_bf16(fa[m][r], kj[2 * k + r / 2]);
      }
      load_v.load(stage * Tiles::V::kBytes, k, fb);
      to_bf16(fb);
      Mma::multiply(acc.x, fa, fb);
    }
  };
  // And into rows of Z: the A operand is k^T itself, discounted, the B operand the keys.
  auto update_z = [&](int stage) {
    using Z = typename Tiles::Z;
    typename Z::A load_rows(smem + Smem::K, lane, 0, tile * kZRows);
    typename Z::B load_columns(smem + Smem::K, lane, 0, column);
    CUTE_NO_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t fa[Z::M][4], fb[Z::N][2];
      load_rows.load(stage * Tiles::K::kBytes, k, fa);
      load_columns.load(stage * Tiles::K::kBytes, k, fb);
      to_bf16(fb);
      CUTE_UNROLL
      for (int m = 0; m < Z::M; ++m) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) {
          fa[m][r] = Pair::to_bf16(fa[m][r]);
          if (Tiles::gated) {
            float2 const g = load_shared_float2(smem + Smem::Decay + stage * (kTokens * 4) + k * 64 + r / 2 * 32 + lane % 4 * 8);
            fa[m][r] = scale_bf16(fa[m][r], g.x, g.y);
          }
        }
      }
      Z::multiply(reinterpret_cast<float (&)[Z::M][Z::N][4]>(acc.x), fa, fb);
    }
  };

  typename Tiles::Ring ring;
  ring.template first<true>(stream);
  bool const is_state = active && !is_z;
  ring.wait_first();
  if (is_state) load_factors(0, 0);
  // Where this thread's rows lie in a snapshot.
  int const rows = is_z ? kZRows : 64, own_row = Mma::row(lane);
  int const place = (is_z ? (tile * kZRows + own_row) * D : kZSize + (tile * 64 + own_row) * E) + column;
  float const count = is_z || pair.x == pair.y ? 1.f : 2.f;
  auto store = [&](auto* out) {
    CUTE_UNROLL
    for (int m = 0; m < Mma::M; ++m) {
      if (m * 16 >= rows) break;
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) store_row(out + place + Mma::row_of(m, 2 * h) * width, acc.x[m], h, count, Mma::N);
    }
  };
  int block = 0;
  CUTE_NO_UNROLL
  for (int n = segment.first; n < segment.last; ++n) {
    if (n > segment.first && active) store(segment.snapshot(n, kSnapshot));
    if (!Tiles::leaves && n + 1 == segment.chunks) break;
    if (Tiles::gated && n > segment.first) acc.scale(segment.decay(n));
    CUTE_NO_UNROLL
    for (int end = block + segment.blocks_of(n); block < end; ++block) {
      int const stage = ring.next(stream);
      if (is_state) {
        update_state(stage, block % 2);
        load_factors(ring.read, (block + 1) % 2);
      } else if (active) {
        update_z(stage);
      }
    }
  }
  // What this segment adds to the states of the next ones (power_carry).
  if (active && segment.has_end()) store(segment.end(kSnapshot));
}

}  // namespace vidrial
