// Bitmap panels: a word for each step says which of its values are kept, the kept ones follow each other.
//
// The including file defines, of the next popcount(bits) values, which stand where the bits are (elsewhere is 0); all may read a whole step:
//   void expand(Cursor<V> at, Word<V> bits, Lanes (&columns)[kLane<V>])
//   void add_step(Sums<V>& sums, Cursor<V> at, Word<V> bits, const float* x)      times kLane<V> numbers of x; Sums{} is 0
//   Lanes total(const Sums<V>&)
#pragma once
#include "lanes.h"

namespace {

// Far enough ahead to cover the latency of memory.
constexpr int64_t kBitmapAhead = 8192;  // bytes

template <class V>
constexpr int64_t steps_of(const sparsec::Matrix& w) {
  return (w.in_features + kLane<V> - 1) / kLane<V>;
}

template <class V, class A>
void bitmap_one(const sparsec::Task& t) {
  constexpr int64_t L = kLane<V>, kStep = 4 / L;  // bits are fetched four columns at a time
  const sparsec::Matrix& w = *t.matrix;
  const float* x = static_cast<const float*>(t.x);
  const int64_t steps = steps_of<V>(w), whole = w.in_features / L;
  Cursor<V> values = cursor<V>(w.values, w.start[t.first]);
  const Word<V>* bits = static_cast<const Word<V>*>(w.columns) + t.first * steps;
  for (int64_t p = t.first; p < t.last; ++p, bits += steps) {
    Sums<V> sums[2] = {};
    int64_t k = 0;
    for (; k + kStep <= whole; k += kStep) {
      __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kBitmapAhead);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kStep; ++j) {
        if (L * j % 2 == 0) __builtin_prefetch(address(values) + kBitmapAhead);
        const Word<V> step = bits[k + j];
        add_step(sums[j % 2], values, step, x + L * (k + j));
        values += __builtin_popcount(step);
      }
    }
    for (; k < whole; ++k) {
      add_step(sums[0], values, bits[k], x + L * k);
      values += __builtin_popcount(bits[k]);
    }
    Lanes sum = add(total(sums[0]), total(sums[1]));
    if (k < steps) {  // columns that fill no lane
      Lanes columns[L];
      expand(values, bits[k], columns);
      for (int64_t c = 0; L * k + c < w.in_features; ++c) add_product(sum, columns[c], x[L * k + c]);
      values += __builtin_popcount(bits[k]);
    }
    finish(sum, static_cast<const A*>(w.bias), 16 * p, least(16, w.out_features - 16 * p), static_cast<A*>(t.out));
  }
}

template <class V>
struct BitmapDecoder {
  static constexpr bool kDirect = true;
  static constexpr int64_t L = kLane<V>;
  Cursor<V> values;
  const Word<V>* bits;

  BitmapDecoder() = default;
  BitmapDecoder(const sparsec::Matrix& w, int64_t panel)
      : values(cursor<V>(w.values, w.start[panel])),
        bits(static_cast<const Word<V>*>(w.columns) + panel * steps_of<V>(w)) {}

  int64_t decode(const sparsec::Matrix&, int64_t begin, int64_t end, float* to, int32_t*, const float**) {
    Cursor<V> next = values;  // a member would be stored and loaded again at every step
    const Word<V>* const words = bits;
    const auto step = [&](int64_t k) {
      Lanes columns[L];
      expand(next, words[k / L], columns);
      next += __builtin_popcount(words[k / L]);
#pragma GCC unroll 2
      for (int64_t c = 0; c < L; ++c)
        if (L == 1 || k + c < end) store_lanes(to + 16 * (k + c - begin), columns[c]);
    };
    int64_t k = begin;
    for (; k + 2 <= end; k += 2) {
      // What the next columns need is fetched while these are multiplied.
      __builtin_prefetch(address(next) + kValueBits<V> * sparsec::kDecodedColumns, 0, 2);
      step(k);
      if (L == 1) step(k + 1);
    }
    if (k < end) step(k);
    values = next;
    return 1;
  }

  // acc [M][16] += the columns times x [in][M], from registers: up to two times this is less work than once through a cache. Each of
  // the two fetches every other line of what comes next, so that memory is not idle in the second: 8 rows 1.2 times as fast.
  template <int M>
  void multiply(int64_t begin, int64_t end, const float* x, float* acc, int64_t ahead, int64_t turn) {
    Cursor<V> next = values;
    Lanes sums[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[m] = load_lanes(acc + 16 * m);
    x += begin * M;
    for (int64_t k = begin; k < end; k += L, x += L * M) {
      if (((k >> 1) & 1) != turn) __builtin_prefetch(address(next) + ahead);
      const Word<V> step = bits[k / L];
      Lanes columns[L];
      expand(next, step, columns);
      next += __builtin_popcount(step);
#pragma GCC unroll 2
      for (int64_t c = 0; c < L; ++c) {
        if (L > 1 && k + c >= end) break;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) add_product(sums[m], columns[c], x[c * M + m]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) store_lanes(acc + 16 * m, sums[m]);
    values = next;
  }
};

struct BitmapKernels : NoKernels {
  template <class V>
  using Decoder = BitmapDecoder<V>;
  template <class V, class A>
  static constexpr sparsec::Kernel one = bitmap_one<V, A>;
};

}  // namespace
