// Dense rows, for what stays dense: the stock product of a half type is slow at few rows of x.
//
// The including file defines `Vec load_wide(const T* values)`: kRegister values as fp32.
#pragma once
#include "lanes.h"

namespace {

constexpr int64_t kDenseAhead = 1024;  // bytes

inline float sum_of(Vec v) {
  float s[kRegister], sum = 0.0f;
  store_vec(s, v);
  for (int width = kRegister / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) s[l] += s[l + width];
  sum = s[0];
  return sum;
}

// R rows of W times M rows of x: every loaded value is used R or M times.
template <int R, int M, class T>
inline void dense_block(const sparsec::Matrix& w, const float* x, int64_t row, T* out, int64_t out_stride) {
  const int64_t in = w.in_features;
  const T* from = static_cast<const T*>(w.values) + row * in;
  Vec sums[R][M] = {};
  int64_t k = 0;
  for (; k + kRegister <= in; k += kRegister) {
    Vec xs[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) xs[m] = load_vec(x + m * in + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(from + r * in + k) + kDenseAhead);
      const Vec v = load_wide(from + r * in + k);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[r][m] += v * xs[m];
    }
  }
  const T* bias = static_cast<const T*>(w.bias);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      float sum = sum_of(sums[r][m]);
      for (int64_t j = k; j < in; ++j) sum += widen(from[r * in + j]) * x[m * in + j];
      if (bias) sum += widen(bias[row + r]);
      narrow(sum, out + m * out_stride + row + r);
    }
}

template <int R, class T>
inline void dense_tokens(const sparsec::Task& t, int64_t row) {
  const float* x = static_cast<const float*>(t.x);
  T* out = static_cast<T*>(t.out);
  const int64_t in = t.matrix->in_features;
  int64_t m = 0;
  for (; m + 4 <= t.tokens; m += 4) dense_block<R, 4>(*t.matrix, x + m * in, row, out + m * t.out_stride, t.out_stride);
  for (; m + 2 <= t.tokens; m += 2) dense_block<R, 2>(*t.matrix, x + m * in, row, out + m * t.out_stride, t.out_stride);
  if (m < t.tokens) dense_block<R, 1>(*t.matrix, x + m * in, row, out + m * t.out_stride, t.out_stride);
}

template <class T>
void dense_rows(const sparsec::Task& t) {
  int64_t row = t.first;
  for (; row + 2 <= t.last; row += 2) dense_tokens<2, T>(t, row);
  if (row < t.last) dense_tokens<1, T>(t, row);
}

template <class T>
void dense_one(const sparsec::Task& t) {
  const float* x = static_cast<const float*>(t.x);
  T* out = static_cast<T*>(t.out);
  int64_t row = t.first;
  for (; row + 4 <= t.last; row += 4) dense_block<4, 1>(*t.matrix, x, row, out, 0);
  for (; row < t.last; ++row) dense_block<1, 1>(*t.matrix, x, row, out, 0);
}

template <class T>
struct DenseDecoder {
  const T* rows;
  int64_t count;

  DenseDecoder() = default;
  DenseDecoder(const sparsec::Matrix& w, int64_t panel)
      : rows(static_cast<const T*>(w.values) + 16 * panel * w.in_features), count(least(16, w.out_features - 16 * panel)) {}

  int64_t decode(const sparsec::Matrix& w, int64_t begin, int64_t end, float* to, int32_t*, const float**) {
    for (int64_t l = 0; l < 16; ++l)
      for (int64_t k = begin; k < end; ++k) to[16 * (k - begin) + l] = l < count ? widen(rows[l * w.in_features + k]) : 0.0f;
    return 1;
  }
};

}  // namespace
