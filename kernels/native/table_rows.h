// Single rows of a matrix, as an embedding looks them up: nothing else of it is expanded.
#pragma once
#include <algorithm>
#include <cstdint>

#include "convert.h"
#include "kernels.h"

namespace {

using sparsec::Matrix;

bool has_rows(const Matrix& w) {
  switch (w.format) {
    case sparsec::kDense:
    case sparsec::kBitmap:
    case sparsec::kDenseInt:
    case sparsec::kBitmapInt:
    case sparsec::kNmInt: return w.type != sparsec::kFloat64;
    default: return false;
  }
}

// f(column, place) of what a panel's words keep of its row r: place is counted among the values of the step, `before` those of the steps
// before; of(count) is how far the values of a step reach.
template <class Word, class F, class Reach>
void each_kept(const Word* words, int64_t steps, int64_t lane, int64_t r, F f, Reach reach) {
  int64_t before = 0;
  for (int64_t s = 0; s < steps; ++s) {
    const uint64_t word = words[s], bits = word >> (lane * r);
    int64_t place = __builtin_popcountll(word & ((uint64_t{1} << (lane * r)) - 1));
    for (int64_t k = 0; k < lane; ++k)
      if (bits >> k & 1) f(lane * s + k, before, place++);
    before += reach(__builtin_popcountll(word));
  }
}

// What a code stands for, in the group of a column.
struct Scales {
  Scales(const Matrix& w, int64_t row) : w(w), first(w.scale + row / sparsec::kPanel * w.groups * (1 + w.middle) * sparsec::kPanel + row % sparsec::kPanel) {}
  float operator()(int code, int64_t column) const {
    if (!code) return 0.0f;
    const uint16_t* const own = first + (w.group ? column / w.group : 0) * (1 + w.middle) * sparsec::kPanel;
    const float number = static_cast<float>(code - 128) * bf16(own[0]);
    return w.middle ? number + bf16(own[sparsec::kPanel]) : number;
  }
  static float bf16(uint16_t bits) { return widen(BFloat16{bits}); }
  const Matrix& w;
  const uint16_t* first;
};

// Row `row` of W in fp32, not yet rounded to its type.
void table_row(const Matrix& w, int64_t row, float* out) {
  const int64_t in = w.in_features, panel = row / sparsec::kPanel, r = row % sparsec::kPanel, steps = (in + w.lane - 1) / w.lane;
  const auto put = [&](int64_t column, float value) {
    if (column < in) out[column] = value;
  };
  if (w.format == sparsec::kDense) {
    by_type(w.type, [&](auto zero) {
      using T = decltype(zero);
      const T* const from = static_cast<const T*>(w.values) + row * in;
      for (int64_t k = 0; k < in; ++k) out[k] = static_cast<float>(widen(from[k]));
    });
    return;
  }
  std::fill_n(out, in, 0.0f);
  if (w.format == sparsec::kBitmap) {
    by_type(w.type, [&](auto zero) {
      using T = decltype(zero);
      const T* const values = static_cast<const T*>(w.values) + w.start[panel];
      const auto f = [&](int64_t column, int64_t before, int64_t place) { put(column, static_cast<float>(widen(values[before + place]))); };
      const auto reach = [](int64_t count) { return count; };
      if (w.lane == 1)
        each_kept(static_cast<const uint16_t*>(w.columns) + panel * steps, steps, w.lane, r, f, reach);
      else
        each_kept(static_cast<const uint32_t*>(w.columns) + panel * steps, steps, w.lane, r, f, reach);
    });
    return;
  }
  const Scales scale(w, row);
  const uint8_t* const values = static_cast<const uint8_t*>(w.values);
  const auto number = [&](const uint8_t* from, int64_t place) {
    return w.bits == 8 ? from[place] : w.table[from[place / 2] >> 4 * (place % 2) & 15];
  };
  if (w.format == sparsec::kDenseInt) {
    for (int64_t k = 0; k < in; ++k) {
      const uint8_t* const lane = values + ((panel * steps + k / 4) * sparsec::kPanel + r) * w.bits / 2;
      out[k] = scale(number(lane, k % 4), k);
    }
    return;
  }
  const uint8_t* const own = values + w.start[panel];
  each_kept(
      static_cast<const uint64_t*>(w.columns) + panel * steps, steps, 4, r,
      [&](int64_t column, int64_t before, int64_t place) { put(column, scale(number(own + before, place), column)); },
      [&](int64_t count) { return w.bits == 8 ? count : (count + 1) / 2; });
}

}  // namespace
