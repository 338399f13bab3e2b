// The tiled objects of vidrial.layout.wgmma as they reach the device: wgmma runs on by itself, reading registers and shared memory until it is
// waited for. `mma_k` and `gemm` issue and commit a group; `wait<N>` waits until at most the last N groups still run.
#pragma once
#include <vidrial/arch/wgmma.cuh>
#include <vidrial/tile/smem.cuh>

namespace vidrial {

// An operand in shared memory: the matrix descriptor of step k, `Rk, Ck` further a step. Band: rows from one warpgroup's part to the next's.
template <class Tile, int Swizzle, int Leading, int Stride, int Rk, int Ck, int Band>
struct Descriptor {
  using T = typename Tile::T;
  // The upper half is the same for all; the lower one begins with the address.
  static constexpr uint64_t kUpper = uint64_t(Stride >> 4) << 32 | uint64_t(Swizzle) << 62;
  uint32_t lower;
  // `row` and `column`: where the part of the tile that is read begins.
  CUTE_DEVICE Descriptor(uint32_t tile, int thread, int row = 0, int column = 0) {
    // NOTE: through a shuffle, so that the compiler knows the warpgroup's index to be uniform.
    if (Band > 0) row += __shfl_sync(~0u, thread / 128, 0) * Band;
    lower = (tile + Tile::plain(row, column)) >> 4 | uint32_t(Leading >> 4) << 16;
  }
  // No sum carries out of the address's 14 bits: shared memory is smaller than 2^18 bytes.
  CUTE_DEVICE uint64_t operator()(uint32_t stage, int k, int row = 0) const { return kUpper | (lower + ((stage + Tile::plain(row + k * Rk, k * Ck)) >> 4)); }
};

// C[M][N] += A[M] B in instructions of 64 x 8 N x 16, a warpgroup's M of them one below the other.
template <class Atom, int M_, int N_, int K_, class A_, class B_, class Row, class Column>
struct WarpgroupMma {
  static constexpr int M = M_, N = N_, K = K_;
  static constexpr bool kAsync = true;
  using A = A_; using B = B_;
  CUTE_DEVICE static int row(int thread) { return ThreadMap<Row>::at(thread); }
  CUTE_DEVICE static int column(int thread) { return ThreadMap<Column>::at(thread); }
  CUTE_HOST_DEVICE static constexpr int row_of(int m, int v) { return m * 64 + v / 2 * 8; }
  CUTE_HOST_DEVICE static constexpr int column_of(int n, int v) { return n * 8 + v % 2; }

  // One step of k for all rows of the warpgroup, or for `Count` times 64 of them from m on, A in registers.
  CUTE_DEVICE static void mma_k(float (&c)[M][N][4], uint32_t (&a)[M][4], B const& b, uint32_t stage, int k) { mma_k<M>(c, 0, a, b, stage, k); }
  template <int Count>
  CUTE_DEVICE static void mma_k(float (&c)[M][N][4], int m, uint32_t (&a)[Count][4], B const& b, uint32_t stage, int k) {
    warpgroup_arrive();
    uint64_t const at = b(stage, k);
    CUTE_UNROLL
    for (int i = 0; i < Count; ++i) Atom::fma(c[m + i], a[i], at);
    warpgroup_commit();
  }
  // All steps of k for 64 rows, A in registers.
  CUTE_DEVICE static void gemm(float (&c)[N][4], uint32_t (&a)[K][4], B const& b, uint32_t stage) {
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < K; ++k) Atom::fma(c, a[k], b(stage, k));
    warpgroup_commit();
  }
  // C = A B for the 64 rows m, A in shared memory from its step k on.
  template <class Operand>
  CUTE_DEVICE static void gemm(float (&c)[N][4], Operand const& a, int m, int k, B const& b, uint32_t stage) {
    warpgroup_arrive();
    CUTE_UNROLL
    for (int i = 0; i < K; ++i) Atom::fma(c, a(0, k + i, m * 64), b(stage, i), i > 0);
    warpgroup_commit();
  }
  // C += A B for all rows of the warpgroup, A and B in shared memory, each in a stage of its own (bytes); or one step of k of it.
  template <class Operand>
  CUTE_DEVICE static void gemm(float (&c)[M][N][4], Operand const& a, uint32_t a_stage, B const& b, uint32_t b_stage) {
    warpgroup_arrive();
    CUTE_UNROLL
    for (int k = 0; k < K; ++k) issue(c, a, a_stage, b, b_stage, k);
    warpgroup_commit();
  }
  template <class Operand>
  CUTE_DEVICE static void mma_k(float (&c)[M][N][4], Operand const& a, uint32_t a_stage, B const& b, uint32_t b_stage, int k) {
    warpgroup_arrive();
    issue(c, a, a_stage, b, b_stage, k);
    warpgroup_commit();
  }

  template <int Groups>
  CUTE_DEVICE static void wait() { warpgroup_wait<Groups>(); }
  // What is written to accumulators before this, or read after it, stays on its side. Operands in registers need no fence: what makes
  // them is volatile. NOTE: one made later than `arrive`, and ptxas serialises all wgmmas (C7513).
  template <int R>
  CUTE_DEVICE static void fence(float (&c)[R][4]) {
    CUTE_UNROLL
    for (int n = 0; n < R; ++n) fence_registers(c[n]);
  }
  CUTE_DEVICE static void fence(float (&c)[M][N][4]) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) fence(c[m]);
  }

 private:
  template <class Operand>
  CUTE_DEVICE static void issue(float (&c)[M][N][4], Operand const& a, uint32_t a_stage, B const& b, uint32_t b_stage, int k) {
    uint64_t const at = b(b_stage, k);
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) Atom::fma(c[m], a(a_stage, k, m * 64), at);
  }
};

}  // namespace vidrial
