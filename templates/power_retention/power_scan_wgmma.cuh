// The state of power retention before every chunk, as power_scan.cuh has it (there: the recurrence, and what a snapshot is), by wgmma.
//
// A warpgroup owns `M` pair tiles of one block I: (I, I + d), ..., (I, I + d + M - 1), counted modulo the number of blocks, so that each pair
// of blocks is met once and most warpgroups have M of them: one of I <= J as it is, one that wrapped around with its rows and columns
// exchanged. Their A operand phi(k)^T is made in registers: rows 16 w + r of a tile are feature 2 w + r / 8 of block I times feature
// r % 8 of block J, so the first one is the same for all tiles: one *broadcast* ldmatrix of a copy of k_I^T with the decay in it.
#pragma once
#include "power_tokens.cuh"
#include <vidrial/arch/shared_memory.cuh>
#include <vidrial/tile/wgmma.cuh>

namespace vidrial {

template <int N> struct Tally { static constexpr int kValue = N; };

template <class Tiles, class Args>
CUTE_DEVICE void power_scan_wgmma(Args const& p) {
  using State = typename Tiles::State;
  using Z = typename Tiles::Z;
  using Smem = typename Tiles::Smem;
  constexpr int D = Tiles::d, E = Tiles::e, kTokens = Tiles::tokens, kColumns = State::N * 8;
  constexpr int kBlocks = D / 8, kParts = E / kColumns, M = State::M, kPairs = kBlocks * (kBlocks + 1) / 2;
  constexpr int kZSize = Tiles::keeps_z ? D * D : 0, kSnapshot = kZSize + kPairs * 64 * E;
  // Groups of products that run on while the next one's factors are made: some 128 cycles of them.
  constexpr int kRunning = State::N > 8 && M < 3 ? 2 : 1;
  // Groups of products for which factors are loaded ahead; 192 accumulators leave no registers for it.
  constexpr int kAhead = M * State::N < 48 ? 1 : 0;
  VIDRIAL_SHARED_MEMORY(raw);

  // NOTE: through a shuffle, so that the compiler knows the warp's index to be uniform.
  int const thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0);
  int const own_warp = warp % 4, own_thread = thread % 128, unit = blockIdx.x * (Tiles::threads / 128) + warp / 4;
  bool const active = unit < Tiles::state_units + Tiles::z_units, is_state = unit < Tiles::state_units;
  // Of a unit of state: block I, the first d, and the columns of V; of one of Z: its rows and columns.
  int const in_kind = is_state ? unit : active ? unit - Tiles::state_units : 0;
  int const block_i = in_kind / kParts % kBlocks, first_d = in_kind / kParts / kBlocks * M;
  int const z_row = in_kind / (D / (Z::N * 8)) * 64, column = is_state ? in_kind % kParts * kColumns : in_kind % (D / (Z::N * 8)) * (Z::N * 8);
  auto block_j = [&](int m) { return (block_i + first_d + m) % kBlocks; };

  Segment<Tiles, Args> const segment(p);
  if (segment.first >= segment.last) return;

  uint32_t const smem = shared_address(raw), own = smem + Smem::Products + warp / 4 * Tiles::products_bytes;
  TokenStream<Tiles, Args> stream(segment, smem, thread);
  // Two neighbouring tokens' decay to the end of their chunk, in a pair.
  auto discount = [&](uint32_t x, int stage, int token) {
    if (!Tiles::gated) return x;
    float2 const g = load_shared_float2(smem + Smem::Decay + stage * (kTokens * 4) + token * 4 + lane % 4 * 8);
    return scale_bf16(x, g.x, g.y);
  };

  // k_I^T of one block of tokens, discounted, for the whole warpgroup: 32 tokens per warp. It is made one block ahead: the barrier that
  // the next block begins with orders it.
  typename Tiles::Tokens load_i(smem + Smem::K, lane, own_warp * 32 % kTokens, block_i * 8);
  auto make_products = [&](int stage, int half) {
    if (own_warp * 32 >= kTokens) return;
    uint32_t ki[4];
    load_i(stage * Tiles::K::kBytes, 0, 0, ki[0], ki[1], ki[2], ki[3]);
    // NOTE: all loads before any store: the compiler cannot know that they do not meet.
    CUTE_UNROLL
    for (int m = 0; m < 4; ++m) ki[m] = discount(ki[m], stage, own_warp * 32 + m * 8);
    CUTE_UNROLL
    for (int m = 0; m < 4; ++m)
      store_shared(own + half * Tiles::Products::kBytes + Tiles::Products::offset(lane / 4, own_warp * 32 + m * 8 + lane % 4 * 2), ki[m]);
  };

  Fragment<State> acc = {};
  typename Tiles::Broadcast load_splat(own, own_thread);
  typename State::B load_v(smem + Smem::V, own_thread, 0, is_state ? column : 0);
  // Features of blocks J and J', 16 tokens: two tiles' at once, or one's.
  uint32_t pair_base[(M + 1) / 2];
  CUTE_UNROLL
  for (int m = 0; m < M; m += 2) {
    typename Tiles::Pairs const load_j(smem + Smem::K, lane, 0, (lane < 16 ? block_j(m) : block_j(min(m + 1, M - 1))) * 8);
    pair_base[m / 2] = load_j.base;
  }
  // Into the first `kCount` tiles. Factors are loaded one group of products ahead: ptxas sinks a load to its use, and there it takes 30 cycles.
  auto update_state = [&](auto count, int stage, int half) {
    constexpr int kCount = decltype(count)::kValue, kGroups = (kCount + 1) / 2, kAll = kGroups * (kTokens / 16);
    uint32_t ki[1 + kAhead][4], kj[1 + kAhead][4];
    auto load = [&](int g) {
      int const k = g / kGroups, m = g % kGroups * 2;
      uint32_t (&x)[4] = ki[k % (1 + kAhead)];
      uint32_t (&y)[4] = kj[g % (1 + kAhead)];
      typename Tiles::Pairs const load_pair(pair_base[m / 2]);
      typename Tiles::Single const load_one(pair_base[m / 2]);
      if (m == 0) load_splat(half * Tiles::Products::kBytes, 0, k * 16, x[0], x[1], x[2], x[3]);
      if (m + 1 < kCount) load_pair(stage * Tiles::K::kBytes, k * 16, 0, y[0], y[1], y[2], y[3]);
      else load_one(stage * Tiles::K::kBytes, k * 16, 0, y[0], y[1]);
    };
    if (kAhead > 0) load(0);
    CUTE_UNROLL
    for (int g = 0; g < kAll; ++g) {
      int const k = g / kGroups, m = g % kGroups * 2;
      if (g + kAhead < kAll) load(g + kAhead);
      uint32_t phi[2][4];
      State::template wait<kRunning>();                // the products before these have read their phi
      CUTE_UNROLL
      for (int i = 0; i < 2 && m + i < kCount; ++i) {
        CUTE_UNROLL
        for (int r = 0; r < 4; ++r) phi[i][r] = multiply_bf16(ki[k % (1 + kAhead)][r], kj[g % (1 + kAhead)][i * 2 + r / 2]);
      }
      if (m + 1 < kCount) State::template mma_k<2>(acc.x, m, phi, load_v, stage * Tiles::V::kBytes, k);
      else State::template mma_k<1>(acc.x, m, reinterpret_cast<uint32_t (&)[1][4]>(phi), load_v, stage * Tiles::V::kBytes, k);
    }
  };
  // And into 64 rows of Z: the A operand is k^T itself, discounted, the B operand the keys.
  auto update_z = [&](int stage) {
    typename Tiles::Rows load_rows(smem + Smem::K, own_thread, 0, z_row);
    typename Z::B load_columns(smem + Smem::K, own_thread, 0, column);
    CUTE_UNROLL
    for (int k = 0; k < kTokens / 16; ++k) {
      uint32_t a[1][4];
      load_rows(stage * Tiles::K::kBytes, k * 16, 0, a[0][0], a[0][1], a[0][2], a[0][3]);
      Z::template wait<1>();
      CUTE_UNROLL
      for (int r = 0; r < 4; ++r) a[0][r] = discount(a[0][r], stage, k * 16 + r / 2 * 8);
      Z::mma_k(reinterpret_cast<float (&)[1][Z::N][4]>(acc.x), a, load_columns, stage * Tiles::K::kBytes, k);
    }
  };

  // Where this thread's rows lie in a snapshot. Rows of a tile that wrapped around are columns of the pair.
  auto stored = [&](int m) {
    if (!is_state) return active && m == 0;
    int const d = first_d + m;
    return d < kBlocks / 2 || (d == kBlocks / 2 && block_i < kBlocks / 2);
  };
  auto place = [&](int m, int h) {
    int const lane = opaque(thread) % 32;
    if (!is_state) return (z_row + own_warp * 16 + h * 8 + lane / 4) * D + column;
    int const j = block_j(m), low = min(block_i, j), high = max(block_i, j), tile = low * kBlocks - low * (low - 1) / 2 + high - low;
    int const feature = own_warp * 2 + h, in_tile = block_i <= j ? feature * 8 + lane / 4 : lane / 4 * 8 + feature;
    return kZSize + (tile * 64 + in_tile) * E + column;
  };
  auto count = [&](int m) { return is_state && first_d + m > 0 ? 2.f : 1.f; };
  int const width = is_state ? State::N : Z::N;
  auto store = [&](auto* out) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) {
      if (!stored(m)) continue;
      float const c = count(m);
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) store_row(out + place(m, h), acc.x[m], h, c, width);
    }
  };

  typename Tiles::Ring ring;
  ring.template first<true>(stream);
  ring.wait_first();
  if (is_state) make_products(0, 0);
  int block = 0;
  CUTE_NO_UNROLL
  for (int n = segment.first; n < segment.last; ++n) {
    State::template wait<0>();
    acc.fence();
    if (n > segment.first) store(segment.snapshot(n, kSnapshot));
    if (!Tiles::leaves && n + 1 == segment.chunks) break;
    if (Tiles::gated && n > segment.first) acc.scale(segment.decay(n));
    acc.fence();
    // NOTE: the branch stands around the whole loop: between products that run, it would keep ptxas from letting them run (C7513).
    int const end = block + segment.blocks_of(n);
    auto each_block = [&](auto update) {
      CUTE_NO_UNROLL
      for (; block < end; ++block) update(ring.next(stream));
    };
    auto update = [&](auto count) {
      each_block([&](int stage) {
        make_products(ring.read, (block + 1) % 2);
        update_state(count, stage, block % 2);
      });
    };
    if (!is_state) {
      each_block([&](int stage) { if (active) update_z(stage); });
    } else if (!Tiles::drops_last || stored(M - 1)) {
      update(Tally<M>{});
    } else if constexpr (Tiles::drops_last) {
      update(Tally<M - 1>{});
    }
  }
  // What this segment adds to the states of the next ones (power_carry).
  if (segment.has_end()) {
    State::template wait<0>();
    acc.fence();
    store(segment.end(kSnapshot));
  }
}

}  // namespace vidrial
