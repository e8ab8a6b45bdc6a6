// N:M: of every m columns in a row n values are stored, with their positions in 2 (m = 4) or 3 bits (m = 8).
//
// The including file defines, with x pointing to the m columns and `positions` to the bytes of one slot:
//   Lanes select4(const float* x, const uint8_t* positions)      lane l: x[position of lane l]; reads 4 bytes
//   Lanes select8(const float* x, const uint8_t* positions)      reads 7 bytes
#pragma once
#include "lanes.h"

namespace {

constexpr int64_t kSlotAhead = 1024;  // bytes

template <int M, class T>
void nm_rows(const sparsec::Task& t) {
  const sparsec::Matrix& w = *t.matrix;
  constexpr int B = M == 4 ? 4 : 6;  // bytes of the positions of 16 lanes
  const float* x = static_cast<const float*>(t.x);
  const int64_t n = w.r, groups = w.in_features / M;
  for (int64_t p = t.first; p < t.last; ++p) {
    const T* values = static_cast<const T*>(w.values) + p * groups * n * 16;
    const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + p * groups * n * B;
    Lanes sums[2] = {};
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t s = 0; s < n; ++s, values += 16, positions += B) {
        __builtin_prefetch(reinterpret_cast<const char*>(values) + kSlotAhead);
        const Lanes picked = M == 4 ? select4(x + g * M, positions) : select8(x + g * M, positions);
        add_product(sums[s & 1], load16(values), picked);
      }
    finish(add(sums[0], sums[1]), static_cast<const T*>(w.bias), 16 * p, least(16, w.out_features - 16 * p),
           static_cast<T*>(t.out));
  }
}

template <class T>
void nm_one(const sparsec::Task& t) {
  t.matrix->c == 4 ? nm_rows<4, T>(t) : nm_rows<8, T>(t);
}

inline uint32_t slot_position(const uint8_t* positions, int lane, int bits) {
  const uint8_t* half = positions + (lane / 8) * bits;
  const int at = (lane % 8) * bits;
  const uint32_t pair = half[at / 8] | static_cast<uint32_t>(half[at / 8 + (at % 8 + bits > 8)]) << 8;
  return (pair >> (at % 8)) & ((1u << bits) - 1);
}

template <class T>
struct NmDecoder {
  int64_t panel;

  NmDecoder() = default;
  NmDecoder(const sparsec::Matrix&, int64_t p) : panel(p) {}

  int64_t decode(const sparsec::Matrix& w, int64_t begin, int64_t end, float* to, int32_t*, const float**) {
    const int64_t n = w.r, m = w.c;
    const int bits = m == 4 ? 2 : 3;
    memset(to, 0, sizeof(float) * 16 * (end - begin));  // begin and end are multiples of m
    const int64_t slot = (panel * (w.in_features / m) + begin / m) * n;
    const T* values = static_cast<const T*>(w.values) + slot * 16;
    const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + slot * 2 * bits;
    for (int64_t g = begin / m; g < end / m; ++g, to += 16 * m)
      for (int64_t s = 0; s < n; ++s, values += 16, positions += 2 * bits)
        for (int l = 0; l < 16; ++l) to[16 * slot_position(positions, l, bits) + l] = widen(values[l]);
    return 1;
  }
};

}  // namespace
