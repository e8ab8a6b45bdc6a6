// Products of quantised values in integers: x as fixed-point numbers of seven-bit digits, W as bytes.
//
// A step is 64 bytes, four columns of 16 output rows, each code - its number + 128 - from 1 to 255; 128 where nothing is kept. x is scaled by
// token and group of columns; a number of x is the sum of its digits times powers of 128, each from -64 to 63. So pairs of products stay below
// 2 * 255 * 64 < 2^15, the 16 bits that AVX2 adds them in, and sums of a group far below 2^31: every instruction set gives the same integers.
// What 128 adds to each code is taken away in advance, once for a group and token.
//
// The including file defines
//   Quads                                          a step in registers
//   IntSums dot(IntSums, Quads, uint32_t x)        adds to 16 sums the products of four codes with four digits
//   Quads load8(const uint8_t*), load4(const uint8_t*, table)             64 codes; 64 halves of bytes, numbers of a table's codes
//   Quads expand8(const uint8_t*, uint64_t bits), expand4(..., table)     the same of those that the bits keep
//   Quads half8(const uint8_t*, int h), half4(..., table, h)              32 of them, in half h of the rows; 0 in the other
//   Quads absent(int h), either(Quads, Quads)      128 in half h and 0 in the other; bits of one or the other
//   Quads ones(uint64_t bits)                      1 where the bits keep a value, else 0
//   void store(uint8_t*, Quads)
//   Table, table_of(const uint8_t*)                the 16 codes of halves of bytes
//   SPARSEC_DIGITS                                 what functions need that call these
#pragma once
#include "lanes.h"

namespace {

typedef int32_t IntVec __attribute__((vector_size(4 * kRegister)));
struct IntSums {
  IntVec v[kRegisters];
};

}  // namespace

#include SPARSEC_DIGIT_PRIMITIVES

namespace {

using sparsec::DigitTask;

constexpr int64_t kDigitAhead = 8192;      // bytes
constexpr int64_t kExpandedSteps = 256;    // of a panel at a time, 16 KB: half of a first-level cache
static_assert(kExpandedSteps == sparsec::kDigitScratchSteps, "the library makes room for them");

SPARSEC_DIGITS inline IntSums all_lanes(int32_t number) {
  IntSums s;
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) s.v[i] = number - IntVec{};
  return s;
}
SPARSEC_DIGITS inline void add_to_all(IntSums& s, int32_t number) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) s.v[i] += number;
}
SPARSEC_DIGITS inline Lanes as_floats(const IntSums& s) {
  Lanes l;
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) l.v[i] = __builtin_convertvector(s.v[i], Vec);
  return l;
}
// Sums of a digit and of the next lower one, as those of both.
SPARSEC_DIGITS inline IntSums both(const IntSums& high, const IntSums& low) {
  IntSums s;
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) s.v[i] = (high.v[i] << 7) + low.v[i];
  return s;
}
SPARSEC_DIGITS inline Lanes number_of(const IntSums (&sums)[1]) { return as_floats(sums[0]); }
SPARSEC_DIGITS inline Lanes number_of(const IntSums (&sums)[2]) { return as_floats(both(sums[0], sums[1])); }
SPARSEC_DIGITS inline Lanes number_of(const IntSums (&sums)[3]) {
  Lanes high = as_floats(both(sums[0], sums[1]));
  const Lanes low = as_floats(sums[2]);
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) high.v[i] = high.v[i] * 128.0f + low.v[i];
  return high;
}

SPARSEC_DIGITS inline Lanes scales_at(const uint16_t* from) {
  float s[16];
  for (int l = 0; l < 16; ++l) s[l] = from_bits(static_cast<uint32_t>(from[l]) << 16);
  return load_lanes(s);
}
SPARSEC_DIGITS inline void add_scaled(Lanes& total, const Lanes& number, const Lanes& scale, float of_x) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) total.v[i] += number.v[i] * (scale.v[i] * of_x);
}

}  // namespace

#include "digit_readers.h"

namespace {

// What a tile of x is: digits [steps][M][D], scales [groups][M], what each group's sums begin with [groups][M][D].
struct DigitTile {
  const uint32_t* x;
  const float* scale;
  const int32_t* begin;
};

// totals [M][16] += groups [first, last) of x's columns times a panel.
template <class Reader, int M, int D, bool Middle>
SPARSEC_DIGITS void digit_groups(const sparsec::Matrix& w, Reader& from, int64_t panel, const DigitTile& t, int64_t first, int64_t last, float* totals) {
  const int64_t across = sparsec::digit_columns(w) / 4, steps = (w.in_features + 3) / 4;
  Reader reader = from;  // a reference would be stored and loaded again at every step
  Lanes total[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) total[m] = load_lanes(totals + 16 * m);
  for (int64_t g = first; g < last; ++g) {
    IntSums sums[M][D], kept[Middle ? M : 1][D];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d) {
        sums[m][d] = all_lanes(t.begin[(g * M + m) * D + d]);
        if (Middle) kept[m][d] = all_lanes(0);
      }
    const int64_t end = least(steps, (g + 1) * across);
    const uint32_t* x = t.x + g * across * M * D;
    for (int64_t k = g * across; k < end; ++k, x += M * D) {
      const Quads step = reader.take();
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) sums[m][d] = dot(sums[m][d], step, x[m * D + d]);
      if (Middle) {
        const Quads own = ones(reader.bits());
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
          for (int d = 0; d < D; ++d) kept[m][d] = dot(kept[m][d], own, x[m * D + d]);
      }
    }
    const uint16_t* const scales = w.scale + (panel * w.groups + (w.group ? g * 4 * across / w.group : 0)) * (Middle ? 32 : 16);
    const Lanes scale = scales_at(scales);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) add_scaled(total[m], number_of(sums[m]), scale, t.scale[g * M + m]);
    if (Middle) {
      const Lanes middle = scales_at(scales + 16);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) add_scaled(total[m], number_of(kept[m]), middle, t.scale[g * M + m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store_lanes(totals + 16 * m, total[m]);
  from = reader;
}

inline DigitTile tile_of(const DigitTask& t, int64_t tile, int64_t groups, int M, int D) {
  const int64_t steps = (t.matrix->in_features + 3) / 4;
  return {t.x + tile * steps * M * D, t.scale + tile * groups * M, t.begin + tile * groups * M * D};
}

template <class A>
void finish_digits(const DigitTask& t, int64_t panel, const float* totals) {
  const int64_t row = 16 * panel, count = least(16, t.matrix->out_features - row);
  for (int64_t token = 0; token < t.tokens; ++token)
    finish(load_lanes(totals + 16 * token), static_cast<const A*>(t.matrix->bias), row, count, static_cast<A*>(t.out) + token * t.out_stride);
}
inline void finish_any(const DigitTask& t, int64_t panel, const float* totals) {
  switch (t.matrix->type) {
    case sparsec::kFloat32: return finish_digits<float>(t, panel, totals);
    case sparsec::kBFloat16: return finish_digits<BFloat16>(t, panel, totals);
    default: return finish_digits<Float16>(t, panel, totals);
  }
}

// As many rows of x as a tile has: straight from the values.
template <class Reader, int M, int D, bool Middle>
SPARSEC_DIGITS void digits_direct(const DigitTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const int64_t steps = (w.in_features + 3) / 4, groups = sparsec::digit_groups_of(w);
  const DigitTile tile = tile_of(t, 0, groups, M, D);
  float totals[16 * M];
  for (int64_t p = t.first; p < t.last; ++p) {
    memset(totals, 0, sizeof(totals));
    Reader reader(w, p, steps);
    digit_groups<Reader, M, D, Middle>(w, reader, p, tile, 0, groups, totals);
    finish_any(t, p, totals);
  }
}

// Many: a panel is expanded into a cache, some steps at a time, and multiplied with every tile.
template <class Reader, int M, int D, bool Middle>
SPARSEC_DIGITS void digits_expanded(const DigitTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const int64_t steps = (w.in_features + 3) / 4, groups = sparsec::digit_groups_of(w), across = sparsec::digit_columns(w) / 4;
  uint8_t* const expanded = reinterpret_cast<uint8_t*>(t.scratch);
  uint64_t kept[Middle ? kExpandedSteps : 1];
  float* const totals = t.scratch + 16 * kExpandedSteps;
  for (int64_t p = t.first; p < t.last; ++p) {
    memset(totals, 0, sizeof(float) * 16 * M * t.tiles);
    Reader reader(w, p, steps);
    for (int64_t k = 0; k < steps; k += kExpandedSteps) {
      const int64_t end = least(steps, k + kExpandedSteps), first = k / across, last = (end + across - 1) / across;
      for (int64_t s = 0; s < end - k; ++s) {
        store(expanded + 64 * s, reader.take());
        if (Middle) kept[s] = reader.bits();
      }
      for (int64_t i = 0; i < t.tiles; ++i) {
        ExpandedReader again{expanded, kept};
        digit_groups<ExpandedReader, M, D, Middle>(w, again, p, tile_of(t, i, groups, M, D), first, last, totals + 16 * M * i);
      }
    }
    finish_any(t, p, totals);
  }
}

}  // namespace

#include "digit_blocks.h"

namespace {

template <class Reader, int M, int D, bool Middle>
SPARSEC_DIGITS void digits_few(const DigitTask& t) {
  if constexpr (Reader::kBits != 0) {
    const sparsec::Matrix& w = *t.matrix;
    if (w.lane == 4 && w.r % 16 == 0) return digits_of_blocks<Reader::kBits, true, M, D, Middle>(t);
    if (w.lane == 4) return digits_of_blocks<Reader::kBits, false, M, D, Middle>(t);
  }
  digits_direct<Reader, M, D, Middle>(t);
}

template <class Reader, int D, bool Middle>
SPARSEC_DIGITS void digits_by_rows(const DigitTask& t) {
  constexpr bool kWide = SPARSEC_DIGIT_ROWS > 2;
  if (t.tiles > 1) {
    constexpr int M = SPARSEC_DIGIT_ROWS / (Middle && kWide ? 2 : 1);
    return digits_expanded<Reader, M, D, Middle>(t);
  }
  switch (t.rows_per_tile) {
    case 1: return digits_few<Reader, 1, D, Middle>(t);
    case 2: return digits_few<Reader, 2, D, Middle>(t);
    default: break;
  }
  if constexpr (kWide) {
    if (Middle || t.rows_per_tile == 4) return digits_few<Reader, 4, D, Middle>(t);
    return digits_few<Reader, Middle ? 4 : 8, D, Middle>(t);
  }
}
template <class Reader, bool Middle>
SPARSEC_DIGITS void digits_by_digits(const DigitTask& t) {
  switch (t.digits) {
    case 1: return digits_by_rows<Reader, 1, Middle>(t);
    case 2: return digits_by_rows<Reader, 2, Middle>(t);
    default: return digits_by_rows<Reader, 3, Middle>(t);
  }
}
template <class Reader>
SPARSEC_DIGITS void digits_by_middle(const DigitTask& t) {
  t.matrix->middle ? digits_by_digits<Reader, true>(t) : digits_by_digits<Reader, false>(t);
}
SPARSEC_DIGITS void digits(const DigitTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  if (w.format == sparsec::kDenseInt) return w.bits == 8 ? digits_by_middle<DenseReader8>(t) : digits_by_middle<DenseReader4>(t);
  if (w.format == sparsec::kBsrInt) return w.bits == 8 ? digits_by_middle<BlockReader<8>>(t) : digits_by_middle<BlockReader<4>>(t);
  w.bits == 8 ? digits_by_middle<BitmapReader8>(t) : digits_by_middle<BitmapReader4>(t);
}

// Digits of one row of x. A group that holds inf or NaN has the scale NaN, and digits of 0.
template <int D>
inline void digitize_row(const sparsec::DigitizeTask& t) {
  constexpr float kMost = D == 1 ? 63.0f : D == 2 ? 8127.0f : 1040319.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  uint32_t taken[D] = {};  // may wrap around: differences are what counts
  for (int d = 0; t.before && d < D; ++d) t.before[d] = 0;
  for (int64_t begin = 0, g = 0; begin < t.in; begin += t.columns, ++g) {
    const int64_t count = least(t.columns, t.in - begin);
    alignas(64) float x[64] = {};
    alignas(64) int32_t number[64];
    memcpy(x, t.x + begin, sizeof(float) * count);
    int32_t size = 0;  // as bits, which are ordered as the numbers are
    for (int i = 0; i < 64; ++i) {
      const int32_t own = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffffu);
      size = own > size ? own : size;
    }
    float most = from_bits(static_cast<uint32_t>(size)), scale = most / kMost;
    if (size >= 0x7f800000) {  // inf or NaN
      scale = from_bits(0x7fc00000u);
      memset(x, 0, sizeof(x));
      most = 0.0f;
    }
    // A reciprocal that would be inf: of x that are all but 0.
    float up = 0.0f;
    if (most > 1e-30f) {
      up = kMost / most;
    } else if (most > 0.0f) {
      for (int i = 0; i < 64; ++i) x[i] *= 1.2676506e30f;  // 2^100
      up = kMost / (most * 1.2676506e30f);
    }
    for (int i = 0; i < 64; ++i) number[i] = static_cast<int32_t>((x[i] * up + kRound) - kRound);
    int8_t digit[D][64];
    int32_t sums[D];
    for (int d = D - 1; d >= 0; --d) {
      int32_t sum = 0;
      for (int i = 0; i < 64; ++i) {
        const int32_t low = d ? ((number[i] + 64) & 127) - 64 : number[i];
        digit[d][i] = static_cast<int8_t>(low);
        number[i] = (number[i] - low) >> 7;
        sum += low;
      }
      sums[d] = sum;
    }
    t.scale[g * t.rows] = scale;
    for (int d = 0; d < D; ++d) t.begin[g * t.rows * D + d] = -128 * sums[d];
    uint32_t* out = t.out + begin / 4 * t.rows * D;
    for (int64_t k = 0; k < (count + 3) / 4; ++k, out += t.rows * D)
      for (int d = 0; d < D; ++d) memcpy(out + d, digit[d] + 4 * k, 4);
    if (!t.before) continue;
    int32_t* before = t.before + (begin / 4 + 1) * t.rows * D;
    for (int64_t k = 0; k < (count + 3) / 4; ++k, before += t.rows * D)
      for (int d = 0; d < D; ++d) {
        for (int i = 0; i < 4; ++i) taken[d] -= static_cast<uint32_t>(128 * digit[d][4 * k + i]);
        before[d] = static_cast<int32_t>(taken[d]);
      }
  }
}
void digitize(const sparsec::DigitizeTask& t) {
  switch (t.digits) {
    case 1: return digitize_row<1>(t);
    case 2: return digitize_row<2>(t);
    default: return digitize_row<3>(t);
  }
}

}  // namespace
