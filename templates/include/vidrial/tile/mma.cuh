// C += A B^T by mma.sync, as vidrial.layout.mma describes it: thread maps are CuTe layouts (thread -> row, thread -> column), steps are
// constants. Nothing is partitioned here.
#pragma once
#include <vidrial/tile/copy.cuh>

namespace vidrial {

// One operand of a tiled MMA in shared memory: the fragments of one step of k, `Rk, Ck` further a step, loads `Rn, Cn` apart.
template <class Atom, class Tile, class Row, class Column, int Rn, int Cn, int Rk, int Ck>
struct Operand : LoadMatrix<Atom, Tile, Row, Column> {
  using LoadMatrix<Atom, Tile, Row, Column>::LoadMatrix;
  // Of the operand's atoms those from `first` on.
  template <int N, int R>
  CUTE_DEVICE void load(uint32_t stage, int k, uint32_t (&f)[N][R], int first = 0) const {
    constexpr int kRegisters = sizeof(typename Atom::DRegisters) / sizeof(uint32_t), kAtoms = kRegisters / R;
    static_assert(kRegisters == 4 && N % kAtoms == 0, "an x4 load fills whole fragments");
    CUTE_UNROLL
    for (int n = 0; n < N; n += kAtoms) {
      int const i = (first + n) / kAtoms;
      (*this)(stage, i * Rn + k * Rk, i * Cn + k * Ck, f[n][0], f[n + 1 / R][1 % R], f[n + 2 / R][2 % R], f[n + 3 / R][3 % R]);
    }
  }
};

// C[M][N] += A[M] B[N] in atoms of 16 x 8; A and B tell where their fragments come from (void: made in registers).
// Row and Column: the thread's first accumulator; the others lie StepM rows, StepN columns apart, and 8 rows within an atom.
template <class Atom, int M_, int N_, int K_, class A_, class B_, class Row, class Column, int StepM, int StepN>
struct TiledMma {
  static constexpr int M = M_, N = N_, K = K_;
  static constexpr bool kAsync = false;
  using A = A_; using B = B_;
  CUTE_DEVICE static int row(int thread) { return ThreadMap<Row>::at(thread); }
  CUTE_DEVICE static int column(int thread) { return ThreadMap<Column>::at(thread); }
  CUTE_HOST_DEVICE static constexpr int row_of(int m, int v) { return m * StepM + v / 2 * 8; }
  CUTE_HOST_DEVICE static constexpr int column_of(int n, int v) { return n * StepN + v % 2; }
  // One step of k, A in registers. `wait` and `fence` are of use where products run on by themselves (vidrial/tile/wgmma.cuh).
  template <int RA, class Operand>
  static CUTE_DEVICE void mma_k(float (&c)[M][N][4], uint32_t (&a)[M][RA], Operand const& b, uint32_t stage, int k) {
    uint32_t f[N][RA / 2];
    b.load(stage, k, f);
    multiply(c, a, f);
  }
  // All steps of k, A and B in shared memory, each in a stage of its own (bytes).
  template <class OperandA, class OperandB>
  static CUTE_DEVICE void gemm(float (&c)[M][N][4], OperandA const& a, uint32_t a_stage, OperandB const& b, uint32_t b_stage) {
    CUTE_UNROLL
    for (int k = 0; k < K; ++k) {
      uint32_t f[M][sizeof(typename Atom::ARegisters) / sizeof(uint32_t)];
      a.load(a_stage, k, f);
      mma_k(c, f, b, b_stage, k);
    }
  }
  template <int Groups>
  static CUTE_DEVICE void wait() {}
  static CUTE_DEVICE void fence(float (&)[M][N][4]) {}
  // A and B in registers: of B's atoms some, from `first` on.
  template <int RA, int RB, int Count>
  static CUTE_DEVICE void multiply(float (&c)[M][N][4], uint32_t const (&a)[M][RA], uint32_t const (&b)[Count][RB], int first = 0) {
    CUTE_UNROLL
    for (int m = 0; m < M; ++m) {
      CUTE_UNROLL
      for (int n = 0; n < Count; ++n) {
        float (&d)[4] = c[m][first + n];
        if constexpr (RA == 4) {
          Atom::fma(d[0], d[1], d[2], d[3], a[m][0], a[m][1], a[m][2], a[m][3], b[n][0], b[n][1], d[0], d[1], d[2], d[3]);
        } else {
          Atom::fma(d[0], d[1], d[2], d[3], a[m][0], a[m][1], b[n][0], d[0], d[1], d[2], d[3]);
        }
      }
    }
  }
};

}  // namespace vidrial
