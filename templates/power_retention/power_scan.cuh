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
#include "power_gates.cuh"
#include "power_snapshot.cuh"
#include <vidrial/arch/shared_memory.cuh>

namespace vidrial {

template <class Tiles, class Args>
CUTE_DEVICE void power_scan(Args const& p) {
  using Pair = vidrial::Pair<typename Tiles::Elem>;
  using Mma = typename Tiles::State;
  using Smem = typename Tiles::Smem;
  constexpr int D = Tiles::d, E = Tiles::e, kTokens = Tiles::tokens, kStages = Tiles::stages, kColumns = Tiles::columns;
  constexpr int kBlocks = D / 8, kPairs = kBlocks * (kBlocks + 1) / 2, kStateUnits = kPairs * (E / kColumns);
  constexpr int kZRows = Tiles::z_rows, kZUnits = Tiles::normalized ? (D / kZRows) * (D / kColumns) : 0;
  constexpr int kZSize = Tiles::normalized ? D * D : 0, kSnapshot = kZSize + kPairs * 64 * E;
  constexpr int kWarps = Tiles::threads / 32;
  VIDRIAL_SHARED_MEMORY(raw);

  // NOTE: through a shuffle, so that the compiler knows the warp's index to be uniform.
  int const thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0), head = blockIdx.z;
  int const unit = blockIdx.x * kWarps + warp;
  bool const is_z = unit >= kStateUnits, active = unit < kStateUnits + kZUnits;
  int const in_kind = is_z ? (active ? unit - kStateUnits : 0) : unit;
  int const width = is_z ? D : E, column = in_kind % (width / kColumns) * kColumns, tile = in_kind / (width / kColumns);
  int2 const pair = is_z ? make_int2(0, 0) : block_pair(tile, kBlocks);

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
  typename Mma::B load_v(smem + Smem::V, lane, 0, is_z ? 0 : column);

  float acc[4][Mma::N][4] = {};
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
      Mma::multiply(acc, fa, fb);
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
      Z::multiply(reinterpret_cast<float (&)[Z::M][Z::N][4]>(acc), fa, fb);
    }
  };

  CUTE_UNROLL
  for (int s = 0; s < kStages - 1; ++s) fetch(s, s);
  int block = 0, read = 0, write = kStages - 1;
  bool const is_state = active && !is_z;
  cute::cp_async_wait<kStages - 2>();
  __syncthreads();
  if (is_state) {
    load_factors(0, 0);
  }
  // Where this thread's rows lie in a snapshot.
  int const rows = is_z ? kZRows : 64, own_row = Mma::row(lane);
  int const place = (is_z ? (tile * kZRows + own_row) * D : kZSize + (tile * 64 + own_row) * E) + column;
  float const count = is_z || pair.x == pair.y ? 1.f : 2.f;
  CUTE_NO_UNROLL
  for (int n = first; n < last; ++n) {
    if (n > first && active) {
      cutlass::bfloat16_t* out = p.snapshots + int64_t(head * chunks + n) * kSnapshot + place + lane % 4 * 8;
      CUTE_UNROLL
      for (int m = 0; m < 4; ++m) {
        if (m * 16 >= rows) break;
        CUTE_UNROLL
        for (int j = 0; j < Mma::N; j += 4) {
          CUTE_UNROLL
          for (int h = 0; h < 2; ++h) {
            auto pair_of = [&](int i) { return pack_bf16(count * acc[m][j + i][2 * h], count * acc[m][j + i][2 * h + 1]); };
            *reinterpret_cast<uint4*>(out + Mma::row_of(m, 2 * h) * width + j * 8) = gather_columns(pair_of(0), pair_of(1), pair_of(2), pair_of(3));
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
      if (is_state) {
        update_state(read, block % 2);
        load_factors(after, (block + 1) % 2);
      } else if (active) {
        update_z(read);
      }
      read = after;
      write = write + 1 == kStages ? 0 : write + 1;
    }
  }
  // What this segment adds to the states of the next ones (power_carry).
  if (active && last < chunks) {
    float* out = p.ends + (int64_t(head) * (gridDim.y - 1) + blockIdx.y) * kSnapshot + place + lane % 4 * 2;
    CUTE_UNROLL
    for (int m = 0; m < 4; ++m) {
      if (m * 16 >= rows) break;
      CUTE_UNROLL
      for (int j = 0; j < Mma::N; ++j) {
        CUTE_UNROLL
        for (int h = 0; h < 2; ++h) {
          *reinterpret_cast<float2*>(out + Mma::row_of(m, 2 * h) * width + j * 8) = make_float2(count * acc[m][j][2 * h], count * acc[m][j][2 * h + 1]);
        }
      }
    }
  }
}

}  // namespace vidrial
