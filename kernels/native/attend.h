// Attention of a few queries over a piece of the cache: scores, their exponentials, and the sum of the values by these.
#pragma once
#include "elementwise.h"

namespace {

// The kRegister numbers from `from` on, `count` of which exist; 0 for the others.
template <class T>
inline Vec load_part(const T* from, int64_t count) {
  float v[kRegister] = {};
  for (int64_t i = 0; i < count; ++i) v[i] = widen(from[i]);
  return load_vec(v);
}
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  return count >= kRegister ? load_wide(from) : load_part(from, count);
}

constexpr int64_t kKeysAhead = 12;  // positions

// A position's numbers, which a cache of the CPU will be asked for soon.
template <class T>
inline void fetch_row(const T* row, int64_t count) {
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
}

// Q queries times the keys of one position at a time.
template <int Q, class T>
inline void score(const sparsec::AttendTask& t, int64_t query) {
  const float* const q = t.q + query * t.padded;
  for (int64_t l = t.first; l < t.last; ++l) {
    float* const score = t.scores + query * sparsec::kPositions + l - t.first;
    if (t.mask && t.mask[l] == -__builtin_inff()) {
      for (int i = 0; i < Q; ++i) score[i * sparsec::kPositions] = -__builtin_inff();
      continue;
    }
    const T* const key = static_cast<const T*>(t.k) + l * t.k_stride;
    if (!query) {  // keys and values are read by all queries, and have left all caches since the last token
      if (l + kKeysAhead < t.last) fetch_row(key + kKeysAhead * t.k_stride, t.width);
      fetch_row(static_cast<const T*>(t.v) + l * t.v_stride, t.value_width);
    }
    Vec sums[Q] = {};
    for (int64_t d = 0; d < t.width; d += kRegister) {
      const Vec k = load_some(key + d, t.width - d);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) sums[i] += k * load_vec(q + i * t.padded + d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) score[i * sparsec::kPositions] = sum_of(sums[i]) * t.scale + (t.mask && !t.cap ? t.mask[l] : 0.0f);
  }
}

// Scores of one query that stay between -cap and cap, and the mask after that.
inline void soften(const sparsec::AttendTask& t, float* scores) {
  for (int64_t l = 0; l < t.last - t.first; l += kRegister)
    store_vec(scores + l, t.cap * hyperbolic_tangent(load_vec(scores + l) * (1.0f / t.cap)));
  if (t.mask)
    for (int64_t l = t.first; l < t.last; ++l) scores[l - t.first] += t.mask[l];
}

// Q queries' sums of the values, of D registers of the width.
template <int Q, int D, class T>
inline void blend(const sparsec::AttendTask& t, int64_t query, int64_t d) {
  Vec sums[Q][D] = {};
  for (int64_t l = t.first; l < t.last; ++l) {
    if (t.mask && t.mask[l] == -__builtin_inff()) continue;
    const T* const value = static_cast<const T*>(t.v) + l * t.v_stride + d;
    const float* const p = t.scores + query * sparsec::kPositions + l - t.first;
#pragma GCC unroll 4
    for (int j = 0; j < D; ++j) {
      const Vec v = load_some(value + j * kRegister, t.value_width - d - j * kRegister);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) sums[i][j] += v * p[i * sparsec::kPositions];
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int j = 0; j < D; ++j) store_vec(t.out + (query + i) * t.padded + d + j * kRegister, sums[i][j]);
}

template <int Q, class T>
inline void attend_queries(const sparsec::AttendTask& t, int64_t query) {
  score<Q, T>(t, query);
  for (int64_t i = query; i < query + Q; ++i) {
    float* const s = t.scores + i * sparsec::kPositions;
    const int64_t count = t.last - t.first;
    if (t.cap) soften(t, s);
    for (int64_t l = count; l % kRegister; ++l) s[l] = -__builtin_inff();
    Vec most = same(-__builtin_inff());
    for (int64_t l = 0; l < count; l += kRegister) most = larger(most, load_vec(s + l));
    float v[kRegister], highest = -__builtin_inff();
    store_vec(v, most);
    for (int l = 0; l < kRegister; ++l) highest = v[l] > highest || v[l] != v[l] ? v[l] : highest;
    t.highest[i] = highest;
    Vec sum = {};
    for (int64_t l = 0; l < count; l += kRegister) {
      // Where nothing is to be seen, nothing is summed: inf - inf would be NaN.
      const Vec e = highest == -__builtin_inff() ? Vec{} : exponential(load_vec(s + l) - highest);
      store_vec(s + l, e);
      sum += e;
    }
    t.sum[i] = sum_of(sum);
  }
  int64_t d = 0;
  for (; d + 4 * kRegister <= t.value_width; d += 4 * kRegister) blend<Q, 4, T>(t, query, d);
  for (; d < t.value_width; d += kRegister) blend<Q, 1, T>(t, query, d);
}

template <class T>
void attend(const sparsec::AttendTask& t) {
  int64_t query = 0;
  for (; query + 4 <= t.queries; query += 4) attend_queries<4, T>(t, query);
  for (; query + 3 <= t.queries; query += 3) attend_queries<3, T>(t, query);
  for (; query + 2 <= t.queries; query += 2) attend_queries<2, T>(t, query);
  if (query < t.queries) attend_queries<1, T>(t, query);
}

}  // namespace
