// N:M: of every m columns in a row n values are stored, with their positions in 2 (m = 4) or 3 bits (m = 8). A step has a slot for each
// column of its lanes: where lanes hold two, those of one row that follow each other.
//
// The including file defines, with x pointing to the m columns and `positions` to the bytes of one slot:
//   Lanes select4(const float* x, const uint8_t* positions)      lane l: x[position of lane l]; reads 4 bytes
//   Lanes select8(const float* x, const uint8_t* positions)      reads 7 bytes
//   void load_step(Cursor<V> at, Lanes (&columns)[kLane<V>])
#pragma once
#include "lanes.h"

namespace {

constexpr int64_t kSlotAhead = 1024;  // bytes

// How many values a panel holds, with those that fill its last step.
template <class V>
constexpr int64_t panel_values(const sparsec::Matrix& w) {
  const int64_t slots = w.in_features / w.c * w.r;
  return (slots + kLane<V> - 1) / kLane<V> * kLane<V> * 16;
}

// X rows of x, from `x` on. Groups are taken as many at a time as fill whole steps.
template <class V, int M, int X, class A>
void nm_panel(const sparsec::Matrix& w, int64_t panel, const float* x, A* out, int64_t out_stride) {
  constexpr int B = M == 4 ? 4 : 6;  // bytes of the positions of 16 lanes
  constexpr int C = X == 1 ? 2 : 1;  // chains that hide the latency of the multiply-add
  constexpr int64_t L = kLane<V>;
  const int64_t n = w.r, in = w.in_features, groups = in / M, together = n % L ? L : 1;
  Cursor<V> values = cursor<V>(w.values, panel * panel_values<V>(w));
  const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + panel * groups * n * B;
  Lanes sums[C][X] = {};
  int64_t chain = 0;
  int64_t group[M * L];  // of a slot, the first column of its group
  for (int64_t s = 0; s < n * together; ++s) group[s] = s / n * M;
  const auto step = [&](int64_t first, int64_t slot, int64_t count) {
    Lanes columns[L];
    __builtin_prefetch(address(values) + kSlotAhead);
    load_step(values, columns);
#pragma GCC unroll 2
    for (int64_t c = 0; c < L; ++c) {
      if (L > 1 && c >= count) break;
#pragma GCC unroll 4
      for (int t = 0; t < X; ++t) {
        const float* from = x + t * in + first + group[slot + c];
        add_product(sums[chain][t], columns[c], M == 4 ? select4(from, positions) : select8(from, positions));
      }
      chain = (chain + 1) % C;
      positions += B;
    }
    values += 16 * L;
  };
  int64_t g = 0;
  for (; g + together <= groups; g += together)
    for (int64_t s = 0; s < n * together; s += L) step(g * M, s, L);
  if (g < groups)
    for (int64_t s = 0; s < n; s += L) step(g * M, s, n - s);
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

template <class V>
struct NmDecoder {
  static constexpr bool kDirect = false;
  static constexpr int64_t L = kLane<V>;
  int64_t panel;

  NmDecoder() = default;
  NmDecoder(const sparsec::Matrix&, int64_t p) : panel(p) {}

  int64_t decode(const sparsec::Matrix& w, int64_t begin, int64_t end, float* to, int32_t*, const float**) {
    const int64_t n = w.r, m = w.c, groups = w.in_features / m;
    const int bits = m == 4 ? 2 : 3;
    memset(to, 0, sizeof(float) * 16 * (end - begin));  // begin and end are multiples of m
    const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + (panel * groups + begin / m) * n * 2 * bits;
    const Cursor<V> values = cursor<V>(w.values, panel * panel_values<V>(w));
    Lanes columns[L];
    int64_t slot = begin / m * n;
    load_step(values + slot / L * L * 16, columns);
    for (int64_t g = begin / m; g < end / m; ++g, to += 16 * m)
      for (int64_t s = 0; s < n; ++s, ++slot, positions += 2 * bits) {
        if (slot % L == 0) load_step(values + slot * 16, columns);
        float numbers[16];
        store_lanes(numbers, columns[slot % L]);
        put(numbers, positions, bits, to);
      }
    return 1;
  }

 private:
  static void put(const float* numbers, const uint8_t* positions, int bits, float* to) {
    for (int half = 0; half < 2; ++half) {
      uint32_t word = 0;
      memcpy(&word, positions + half * bits, 2);
      if (bits == 3) word |= static_cast<uint32_t>(positions[half * bits + 2]) << 16;
#pragma GCC unroll 8
      for (int l = 8 * half; l < 8 * half + 8; ++l, word >>= bits) to[16 * (word & ((1u << bits) - 1)) + l] = numbers[l];
    }
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
