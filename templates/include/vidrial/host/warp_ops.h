// mma.sync and ldmatrix in software. Lane layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" and following.
#pragma once
#include <vidrial/host/cta.h>

namespace vidrial::host {

struct bf16 { static float to_float(uint32_t x) { return bits<float>(x << 16); } };
struct fp16 {
  static float to_float(uint32_t x) {
    __half_raw raw;
    raw.x = uint16_t(x);
    return __half2float(__half(raw));
  }
};

// D[16][8] = A[16][K] B[K][8] + C: exact products, summed in float in the order of k (the hardware's order is not specified).
template <class Element, int K>
void multiply_warp(MmaArgument<K>** lanes) {
  float a[16][K], b[K][8], d[16][8];
  for (int t = 0; t < 32; ++t) {
    int const row = t >> 2, pair = (t & 3) * 2;
    MmaArgument<K> const& x = *lanes[t];
    for (int e = 0; e < 2; ++e) {
      int const shift = 16 * e;
      for (int h = 0; h < K / 8; ++h) {
        a[row][8 * h + pair + e] = Element::to_float(x.a[2 * h] >> shift & 0xffff);
        a[row + 8][8 * h + pair + e] = Element::to_float(x.a[2 * h + 1] >> shift & 0xffff);
        b[8 * h + pair + e][row] = Element::to_float(x.b[h] >> shift & 0xffff);
      }
      d[row][pair + e] = x.c[e];
      d[row + 8][pair + e] = x.c[2 + e];
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int t = 0; t < 32; ++t)
    for (int v = 0; v < 4; ++v) lanes[t]->c[v] = d[(t >> 2) + (v >> 1) * 8][(t & 3) * 2 + (v & 1)];
  ++counted().mma;
}

template <class Element, int K>
void mma(MmaArgument<K>& argument) {
  require_full_warp("mma.sync");
  collective(K == 16 ? "wait in mma.m16n8k16" : "wait in mma.m16n8k8", ~0u, __builtin_return_address(0), argument, multiply_warp<Element, K>);
}

struct MatrixArgument { void const* row; uint16_t data[8]; uint32_t result[4]; };

// Matrix i has its 8 rows from lanes 8i to 8i + 7; lane t gets elements 2(t % 4) and the next of row t / 4, or of column t / 4.
template <int Matrices, bool Transposed>
void load_warp(MatrixArgument** lanes) {
  for (int i = 0; i < Matrices; ++i) {
    MatrixArgument** const rows = lanes + 8 * i;
    uintptr_t address[8];
    for (int r = 0; r < 8; ++r) address[r] = uintptr_t(rows[r]->row);
    counted().ldmatrix_conflicts += bank_conflicts(address, 8);
    for (int t = 0; t < 32; ++t) {
      int const g = t >> 2, pair = (t & 3) * 2;
      uint32_t const low = Transposed ? rows[pair]->data[g] : rows[g]->data[pair];
      uint32_t const high = Transposed ? rows[pair + 1]->data[g] : rows[g]->data[pair + 1];
      lanes[t]->result[i] = low | high << 16;
    }
  }
  ++counted().ldmatrix;
}

// The row is read by the lane that gives its address: a sanitizer blames the right thread. Lanes beyond 8 Matrices give none.
template <int Matrices, bool Transposed>
void ldmatrix(void const* row, uint32_t (&result)[Matrices]) {
  OnBehalfOf const kernel(__builtin_return_address(0));
  require_full_warp("ldmatrix");
  MatrixArgument argument{row, {}, {}};
  if (lane() < 8 * Matrices) {
    if (uintptr_t(row) % 16) fatal("ldmatrix: the row address %p is not a multiple of 16", row);
#if !VIDRIAL_ASAN
    if (!in_shared(row, 16)) fatal("ldmatrix: the row is not in shared memory (the launch asked for %zu bytes)", shared_bytes);
#endif
    memcpy(argument.data, row, 16);
  }
  collective(Transposed ? "wait in ldmatrix.trans" : "wait in ldmatrix", ~0u, __builtin_return_address(0), argument, load_warp<Matrices, Transposed>);
  for (int i = 0; i < Matrices; ++i) result[i] = argument.result[i];
}

template void mma<bf16, 8>(MmaArgument<8>&);
template void mma<fp16, 8>(MmaArgument<8>&);
template void mma<bf16, 16>(MmaArgument<16>&);
template void mma<fp16, 16>(MmaArgument<16>&);
template void ldmatrix<1, false>(void const*, uint32_t (&)[1]);
template void ldmatrix<2, false>(void const*, uint32_t (&)[2]);
template void ldmatrix<4, false>(void const*, uint32_t (&)[4]);
template void ldmatrix<1, true>(void const*, uint32_t (&)[1]);
template void ldmatrix<2, true>(void const*, uint32_t (&)[2]);
template void ldmatrix<4, true>(void const*, uint32_t (&)[4]);

}  // namespace vidrial::host
