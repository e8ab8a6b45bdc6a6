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
    const bool whole = w.r % L == 0;  // a step has slots of one group alone
    if (w.c == 4)
      whole ? groups<4, L>(w, begin, end, to) : groups<4, 1>(w, begin, end, to);
    else
      whole ? groups<8, L>(w, begin, end, to) : groups<8, 1>(w, begin, end, to);
    return 1;
  }

 private:
  // Begin and end are multiples of M; T slots are taken together.
  template <int M, int64_t T>
  void groups(const sparsec::Matrix& w, int64_t begin, int64_t end, float* to) const {
    constexpr int B = M == 4 ? 2 : 3;  // bits of a position
    const int64_t n = w.r, first = begin / M;
    const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + (panel * (w.in_features / M) + first) * n * 2 * B;
    const Cursor<V> values = cursor<V>(w.values, panel * panel_values<V>(w));
    int64_t slot = first * n;
    for (int64_t g = first; g < end / M; ++g) {
      LaneBits columns[M][kRegisters] = {};
      for (int64_t s = 0; s < n; s += T, slot += T) {
        Lanes stored[L];
        load_step(values + slot / L * L * 16, stored);
#pragma GCC unroll 2
        for (int64_t j = 0; j < T; ++j, positions += 2 * B) {
          const Lanes& numbers = stored[T == L ? j : slot % L];
#pragma GCC unroll 4
          for (int i = 0; i < kRegisters; ++i) {
            const LaneBits at = positions_of<B>(positions, i), number = (LaneBits)numbers.v[i];
#pragma GCC unroll 8
            for (uint32_t c = 0; c < M; ++c) columns[c][i] |= number & (LaneBits)(at == c);
          }
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < M; ++c, to += 16)
#pragma GCC unroll 4
        for (int i = 0; i < kRegisters; ++i) store_vec(to + i * kRegister, (Vec)columns[c][i]);
    }
  }

  // Of the lanes in register i: eight lanes have B bytes.
  template <int B>
  static LaneBits positions_of(const uint8_t* from, int i) {
    uint32_t low, high = 0;
    memcpy(&low, from, 4);
    if (B == 3) {
      uint16_t rest;
      memcpy(&rest, from + 4, 2);
      high = rest;
    }
    const uint32_t halves[2] = {low & ((1u << (8 * B)) - 1), low >> (8 * B) | high << (32 - 8 * B)};
    LaneBits shift, upper;
#pragma GCC unroll 16
    for (int l = 0; l < kRegister; ++l) {
      const int lane = i * kRegister + l;
      shift[l] = static_cast<uint32_t>(lane % 8 * B);
      upper[l] = lane < 8 ? 0 : ~0u;
    }
    return (((halves[0] - LaneBits{}) & ~upper) | ((halves[1] - LaneBits{}) & upper)) >> shift & ((1u << B) - 1);
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
