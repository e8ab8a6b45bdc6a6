// N:M: of every m columns in a row n values are stored, with their positions in 2 (m = 4) or 3 bits (m = 8).
//
// The including file defines, with x pointing to the m columns and `positions` to the bytes of one slot:
//   Lanes select4(const float* x, const uint8_t* positions)      lane l: x[position of lane l]; reads 4 bytes
//   Lanes select8(const float* x, const uint8_t* positions)      reads 7 bytes
#pragma once
#include "lanes.h"

namespace {

constexpr int64_t kSlotAhead = 1024;  // bytes

// X rows of x, from `x` on.
template <class V, int M, int X, class A>
void nm_panel(const sparsec::Matrix& w, int64_t panel, const float* x, A* out, int64_t out_stride) {
  constexpr int B = M == 4 ? 4 : 6;  // bytes of the positions of 16 lanes
  constexpr int C = X == 1 ? 2 : 1;  // chains that hide the latency of the multiply-add
  const int64_t n = w.r, in = w.in_features, groups = in / M;
  Cursor<V> values = cursor<V>(w.values, panel * groups * n * 16);
  const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + panel * groups * n * B;
  Lanes sums[C][X] = {};
  int64_t chain = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t s = 0; s < n; ++s, values += 16, positions += B) {
      __builtin_prefetch(address(values) + kSlotAhead);
      const Lanes column = load16(values);
#pragma GCC unroll 4
      for (int t = 0; t < X; ++t) {
        const float* from = x + t * in + g * M;
        add_product(sums[chain][t], column, M == 4 ? select4(from, positions) : select8(from, positions));
      }
      chain = (chain + 1) % C;
    }
  const A* bias = static_cast<const A*>(w.bias);
  const int64_t row = 16 * panel, count = least(16, w.out_features - row);
  for (int t = 0; t < X; ++t)
    finish(C == 2 ? add(sums[0][t], sums[C - 1][t]) : sums[0][t], bias, row, count, out + t * out_stride);
}

template <int M, class V, class A>
void nm_any(const sparsec::Task& t) {
  const float* x = static_cast<const float*>(t.x);
  A* out = static_cast<A*>(t.out);
  const int64_t in = t.matrix->in_features;
  for (int64_t p = t.first; p < t.last; ++p) {
    int64_t token = 0;
    for (; token + 4 <= t.tokens; token += 4)
      nm_panel<V, M, 4>(*t.matrix, p, x + token * in, out + token * t.out_stride, t.out_stride);
    for (; token + 2 <= t.tokens; token += 2)
      nm_panel<V, M, 2>(*t.matrix, p, x + token * in, out + token * t.out_stride, t.out_stride);
    if (token < t.tokens) nm_panel<V, M, 1>(*t.matrix, p, x + token * in, out + token * t.out_stride, t.out_stride);
  }
}

template <class V, class A>
void nm_rows(const sparsec::Task& t) {
  t.matrix->c == 4 ? nm_any<4, V, A>(t) : nm_any<8, V, A>(t);
}

inline uint32_t slot_position(const uint8_t* positions, int lane, int bits) {
  const uint8_t* half = positions + (lane / 8) * bits;
  const int at = (lane % 8) * bits;
  const uint32_t pair = half[at / 8] | static_cast<uint32_t>(half[at / 8 + (at % 8 + bits > 8)]) << 8;
  return (pair >> (at % 8)) & ((1u << bits) - 1);
}

template <class V>
struct NmDecoder {
  static constexpr bool kDirect = false;
  int64_t panel;

  NmDecoder() = default;
  NmDecoder(const sparsec::Matrix&, int64_t p) : panel(p) {}

  int64_t decode(const sparsec::Matrix& w, int64_t begin, int64_t end, float* to, int32_t*, const float**) {
    const int64_t n = w.r, m = w.c;
    const int bits = m == 4 ? 2 : 3;
    memset(to, 0, sizeof(float) * 16 * (end - begin));  // begin and end are multiples of m
    const int64_t slot = (panel * (w.in_features / m) + begin / m) * n;
    Cursor<V> values = cursor<V>(w.values, slot * 16);
    const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + slot * 2 * bits;
    for (int64_t g = begin / m; g < end / m; ++g, to += 16 * m)
      for (int64_t s = 0; s < n; ++s, values += 16, positions += 2 * bits)
        for (int l = 0; l < 16; ++l) to[16 * slot_position(positions, l, bits) + l] = widen(values[l]);
    return 1;
  }
};

struct NmKernels : NoKernels {
  template <class V>
  using Decoder = NmDecoder<V>;
  template <class V, class A>
  static constexpr sparsec::Kernel one = nm_rows<V, A>;
  template <class V, class A>
  static constexpr sparsec::Kernel rows = nm_rows<V, A>;
};

}  // namespace
