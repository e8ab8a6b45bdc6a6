// Bitmap panels: 16 bits per column say which of 16 output rows keep it, the kept values follow each other.
//
// The including file defines `Lanes expand16(Cursor<V> at, uint32_t bits)`: the next popcount(bits) values put where the bits are,
// 0 elsewhere; it may read 16 values.
#pragma once
#include "lanes.h"

namespace {

// Far enough ahead to cover the latency of memory.
constexpr int64_t kBitmapAhead = 2048;  // bytes

template <class V, class A>
void bitmap_one(const sparsec::Task& t) {
  const sparsec::Matrix& w = *t.matrix;
  const float* x = static_cast<const float*>(t.x);
  const int64_t in = w.in_features;
  Cursor<V> values = cursor<V>(w.values, w.start[t.first]);
  const uint16_t* bits = static_cast<const uint16_t*>(w.columns) + t.first * in;
  for (int64_t p = t.first; p < t.last; ++p, bits += in) {
    Lanes a = zero_lanes(), b = a;
    int64_t k = 0;
    for (; k + 4 <= in; k += 4) {
      __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kBitmapAhead);
#pragma GCC unroll 2
      for (int64_t j = k; j < k + 4; j += 2) {
        __builtin_prefetch(address(values) + kBitmapAhead);
        const uint32_t first = bits[j], second = bits[j + 1];
        add_product(a, expand16(values, first), x[j]);
        values += __builtin_popcount(first);
        add_product(b, expand16(values, second), x[j + 1]);
        values += __builtin_popcount(second);
      }
    }
    for (; k < in; ++k) {
      add_product(a, expand16(values, bits[k]), x[k]);
      values += __builtin_popcount(bits[k]);
    }
    finish(add(a, b), static_cast<const A*>(w.bias), 16 * p, least(16, w.out_features - 16 * p), static_cast<A*>(t.out));
  }
}

template <class V>
struct BitmapDecoder {
  static constexpr bool kDirect = true;
  Cursor<V> values;
  const uint16_t* bits;

  BitmapDecoder() = default;
  BitmapDecoder(const sparsec::Matrix& w, int64_t panel)
      : values(cursor<V>(w.values, w.start[panel])),
        bits(static_cast<const uint16_t*>(w.columns) + panel * w.in_features) {}

  int64_t decode(const sparsec::Matrix&, int64_t begin, int64_t end, float* to, int32_t*, const float**) {
    Cursor<V> next = values;  // a member would be stored and loaded again at every column
    const uint16_t* const masks = bits;
    const auto column = [&](int64_t k) {
      store_lanes(to, expand16(next, masks[k]));
      next += __builtin_popcount(masks[k]);
      to += 16;
    };
    int64_t k = begin;
    for (; k + 2 <= end; k += 2) {
      // What the next columns need is fetched while these are multiplied.
      __builtin_prefetch(address(next) + kValueBits<V> * sparsec::kDecodedColumns, 0, 2);
      column(k);
      column(k + 1);
    }
    if (k < end) column(k);
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
    for (int64_t k = begin; k < end; ++k, x += M) {
      if (((k >> 1) & 1) != turn) __builtin_prefetch(address(next) + ahead);
      const uint32_t column = bits[k];
      const Lanes w = expand16(next, column);
      next += __builtin_popcount(column);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) add_product(sums[m], w, x[m]);
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
