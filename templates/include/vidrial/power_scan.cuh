// The state of power retention before every chunk: a scan that keeps the state in registers.
//
//   S_{n+1} = 2^(a_end) S_n + sum_t to_end_t phi(k_t) v_t^T        Z_{n+1} = 2^(a_end) Z_n + sum_t to_end_t k_t k_t^T
//
// A warp owns one 64-row tile of the state (power_tiles.cuh), or 64 rows of Z, times `columns` columns of V, in float over all chunks
// of its segment; before each chunk it writes a bf16 snapshot. phi is made in registers: k_j^T comes by ldmatrix.trans, k_i by a
// *broadcast* ldmatrix of a warp-private copy of k^T, so that one load is the k_i of a whole fragment.
//
// Snapshot of (head, chunk): Z [D][D] (if normalised), then the tiles, [64][E] each, times how often their products count.
#pragma once
#include <vidrial/power_gates.cuh>
#include <vidrial/power_tiles.cuh>
#include <vidrial/shared_memory.cuh>
#include <vidrial/tiled.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_scan(Args const& p) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using Mma = typename Tiles::State;
  using Smem = typename Tiles::Smem;
  constexpr int D = Tiles::d, E = Tiles::e, kTokens = Tiles::tokens, kStages = Tiles::stages, kColumns = Tiles::columns;
  using State = StateTiles<D>;
  constexpr int kStateUnits = State::kAll * (E / kColumns);
  constexpr int kZRows = D < 64 ? D : 64, kZUnits = Tiles::normalized ? (D / kZRows) * (D / kColumns) : 0;
  constexpr int kZSize = Tiles::normalized ? D * D : 0, kSnapshot = kZSize + State::kAll * 64 * E;
  constexpr int kWarps = Tiles::threads / 32;
  VIDRIAL_SHARED_MEMORY(raw);

  // NOTE: through a shuffle, so that the compiler knows the warp's index to be uniform.
  int const thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0), head = blockIdx.z;
  int const unit = blockIdx.x * kWarps + warp, z_unit = unit - kStateUnits;
  int const column = (z_unit < 0 ? unit % (E / kColumns) : z_unit % (D / kColumns)) * kColumns;
  int const tile = z_unit < 0 ? unit / (E / kColumns) : z_unit / (D / kColumns);
  enum { kPair, kMerged, kSquares, kZ, kIdle };
  int const kind = z_unit >= 0 ? (z_unit < kZUnits ? kZ : kIdle) : State::is_squares(tile) ? kSquares : State::is_merged(tile) ? kMerged : kPair;
  int2 const pair = State::blocks(kind < kSquares ? tile : 0);

  int const chunks = (p.t + p.chunk - 1) / p.chunk, per_segment = (chunks + gridDim.y - 1) / gridDim.y;
  int const first = blockIdx.y * per_segment, last = min(first + per_segment, chunks);
  // The last chunk of all updates nothing: no state is asked for behind it. So every token read here exists.
  int const blocks = (min(last, chunks - 1) - first) * (p.chunk / kTokens);
  if (first >= last) return;

  uint32_t const smem = shared_address(raw), own = smem + Smem::Products + warp * Tiles::products_bytes;
  int64_t const batch = head / p.h, kv_head = head % p.h, token = int64_t(first) * p.chunk;
  typename Tiles::CopyK copy_k(p.k + batch * p.k_stride[0] + token * p.k_stride[1] + kv_head * p.k_stride[2], p.k_stride[1], smem + Smem::K, thread);
  typename Tiles::CopyV copy_v(p.v + batch * p.v_stride[0] + token * p.v_stride[1] + kv_head * p.v_stride[2], p.v_stride[1], smem + Smem::V, thread);
  // NOTE: rows of the gates' tables fit an int, since the arrays have at most 2^31 elements; 64-bit indices cost the inner loop a spill.
  int const row = (head * chunks + first) * p.chunk;
  auto fetch = [&](int block, int stage) {
    if (block < blocks) {
      copy_k.full(stage * Tiles::K::kBytes); copy_k.source += kTokens * p.k_stride[1];
      copy_v.full(stage * Tiles::V::kBytes); copy_v.source += kTokens * p.v_stride[1];
      if (Tiles::gated && thread < kTokens / 4) {
        cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(*reinterpret_cast<cute::uint128_t const*>(p.to_end + row + block * kTokens + thread * 4),
                                                              shared_vector(smem + Smem::Decay + stage * (kTokens * 4) + thread * 16));
      }
    }
    cute::cp_async_fence();
  };

  typename Tiles::Tokens load_i(smem + Smem::K, lane, 0, pair.x * 8), load_j(smem + Smem::K, lane, 0, pair.y * 8);
  typename Tiles::Broadcast load_splat(own, lane, 0, 0);
  typename Mma::B load_v(smem + Smem::V, lane, 0, z_unit < 0 ? column : 0);

  float acc[4][Mma::N][4] = {};
  // The B operand is V, or for Z the keys themselves.
  auto product = [&](uint32_t stage, int k, uint32_t const (&fa)[4][4], bool z) {
    uint32_t fb[Mma::N][2];
    if (z) typename Tiles::Z::B(smem + Smem::K, lane, 0, column).load(stage * Tiles::K::kBytes, k, fb);
    else load_v.load(stage * Tiles::V::kBytes, k, fb);
    CUTE_UNROLL
    for (int n = 0; n < Mma::N; ++n) { fb[n][0] = Pair::to_bf16(fb[n][0]); fb[n][1] = Pair::to_bf16(fb[n][1]); }
    Mma::multiply(acc, fa, fb);
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
      uint32_t fa[4][4];
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        load_splat(half * Tiles::Products::kBytes, 2 * m, k * 16, fa[m][0], fa[m][1], fa[m][2], fa[m][3]);
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) fa[m][r] = multiply_bf16(fa[m][r], kj[2 * k + r / 2]);
      }
      product(stage, k, fa, false);
    }
  };
  // Two diagonal blocks in one tile: where j < i the factors are the second block's, for ldmatrix a matter of addresses.
  auto update_merged = [&](int stage) {
    typename Tiles::Diagonal load(smem + Smem::K, lane, 0, pair.x * 8);
    uint32_t x[4];                           // k^T of 16 tokens: two registers of the first block, two of the second
    CUTE_NO_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      load(stage * Tiles::K::kBytes, k * 16, 0, x[0], x[1], x[2], x[3]);
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) {
        float2 g = make_float2(1.f, 1.f);
        if (Tiles::gated) g = load_shared_float2(smem + Smem::Decay + stage * (kTokens * 4) + k * 64 + r % 2 * 32 + lane % 4 * 8);
        uint32_t const at = own + r / 2 * Tiles::Products::kBytes + Tiles::Products::offset(lane / 4, k * 16 + r % 2 * 8 + lane % 4 * 2);
        store_shared(at, scale_bf16(Pair::to_bf16(x[r]), g.x, g.y));
      }
    }
    __syncwarp();
    CUTE_NO_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t fa[4][4];
      load(stage * Tiles::K::kBytes, k * 16, 0, x[0], x[1], x[2], x[3]);
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) x[r] = Pair::to_bf16(x[r]);
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        load_splat(lane % 8 < 2 * m + lane / 8 % 2 ? Tiles::Products::kBytes : 0, 2 * m, k * 16, fa[m][0], fa[m][1], fa[m][2], fa[m][3]);
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) fa[m][r] = multiply_bf16(fa[m][r], lane / 4 < 2 * m + r % 2 ? x[2 + r / 2] : x[r / 2]);
      }
      product(stage, k, fa, false);
    }
  };
  // 64 rows of Z, or the squares of the odd blocks' features: the A operand is k^T itself, discounted.
  auto update_rows = [&](int stage, auto const& load, int atoms, int step, bool z) {
    CUTE_NO_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t fa[4][4] = {};
      float2 g[2] = {{1.f, 1.f}, {1.f, 1.f}};
      if (Tiles::gated) {
        g[0] = load_shared_float2(smem + Smem::Decay + stage * (kTokens * 4) + k * 64 + lane % 4 * 8);
        g[1] = load_shared_float2(smem + Smem::Decay + stage * (kTokens * 4) + k * 64 + 32 + lane % 4 * 8);
      }
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        if (m >= atoms) break;
        load(stage * Tiles::K::kBytes, k * 16, m * step, fa[m][0], fa[m][1], fa[m][2], fa[m][3]);
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) {
          uint32_t const x = Pair::to_bf16(fa[m][r]);
          fa[m][r] = Tiles::gated ? scale_bf16(x, g[r / 2].x, g[r / 2].y) : x;
          if (!z) fa[m][r] = multiply_bf16(fa[m][r], x);
        }
      }
      product(stage, k, fa, z);
    }
  };

  CUTE_UNROLL
  for (int s = 0; s < kStages - 1; ++s) fetch(s, s);
  int block = 0, read = 0, write = kStages - 1;
  cute::cp_async_wait<kStages - 2>();
  __syncthreads();
  if (kind == kPair) {
    load_factors(0, 0);
  }
  int const row0 = Mma::row(lane), column0 = column + Mma::column(lane), rows = kind == kZ ? kZRows : 64, width = kind == kZ ? D : E;
  int const place = kind == kZ ? (tile * kZRows + row0) * D + column0 : kZSize + (tile * 64 + row0) * E + column0;
  // How often the product of a row counts in the square of a sum: once on the diagonal.
  auto count = [&](int m, int h) { return kind == kPair || (kind == kMerged && lane / 4 != 2 * m + h) ? 2.f : 1.f; };
  CUTE_NO_UNROLL
  for (int n = first; n < last; ++n) {
    if (n > first && kind != kIdle) {
      cutlass::bfloat16_t* out = p.snapshots + int64_t(head * chunks + n) * kSnapshot + place;
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        if (m * 16 >= rows) break;
        CUTE_UNROLL
        for (int j = 0; j < Mma::N; ++j) {
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) {
            float const c = count(m, h);
            *reinterpret_cast<uint32_t*>(out + Mma::row_of(m, 2 * h) * width + Mma::column_of(j, 0)) = pack_bf16(c * acc[m][j][2 * h], c * acc[m][j][2 * h + 1]);
          }
        }
      }
    }
    if (n + 1 == chunks) break;
    if (Tiles::gated && n > first) {
      float2 const total = p.a[(head * chunks + n + 1) * p.chunk - 1];
      float const f = exp2_approx(total.x + total.y);
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        CUTE_UNROLL
        for (int j = 0; j < Mma::N; ++j) {
          CUTE_UNROLL
          for (int v = 0; v < 4; ++v) acc[m][j][v] *= f;
        }
      }
    }
    CUTE_NO_UNROLL
    for (int end = block + p.chunk / kTokens; block < end; ++block) {
      // Block and the one after it have landed; the one before it is done with.
      cute::cp_async_wait<kStages - 3>();
      __syncthreads();
      fetch(block + kStages - 1, write);
      int const after = read + 1 == kStages ? 0 : read + 1;
      if (kind == kPair) {
        update_state(read, block % 2);
        load_factors(after, (block + 1) % 2);
      } else if (kind == kMerged) {
        update_merged(read);
      } else if (kind == kSquares) {
        update_rows(read, typename Tiles::Squares(smem + Smem::K, lane, 0, 8), State::kSquareAtoms, 32, false);
      } else if (kind == kZ) {
        update_rows(read, typename Tiles::Z::A(smem + Smem::K, lane, 0, tile * kZRows), kZRows / 16, 16, true);
      }
      read = after;
      write = write + 1 == kStages ? 0 : write + 1;
    }
  }
  // What this segment adds to the states of the next ones (power_carry).
  if (kind != kIdle && last < chunks) {
    float* out = p.ends + (int64_t(head) * (gridDim.y - 1) + blockIdx.y) * kSnapshot + place;
    CUTE_UNROLL
    for (int m = 0; m < 4; ++m) {
      if (m * 16 >= rows) break;
      CUTE_UNROLL
      for (int j = 0; j < Mma::N; ++j) {
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          float const c = count(m, h);
          *reinterpret_cast<float2*>(out + Mma::row_of(m, 2 * h) * width + Mma::column_of(j, 0)) = make_float2(c * acc[m][j][2 * h], c * acc[m][j][2 * h + 1]);
        }
      }
    }
  }
}

}  // namespace vidrial
