// Row loops of the CSR product.
//
// The including file defines, for every V and I in uint16_t, int32_t, Delta:
//   float dot(Cursor<V> values, const I* columns, const float* x, int64_t stored)      one row of W times one row of x
//   void widen8(Cursor<V> at, float* out)                                               eight values to fp32
#pragma once
#include "lanes.h"

namespace {

template <class V, class A, class I>
void csr_one(const sparsec::Task& t) {
  const sparsec::Matrix& w = *t.matrix;
  const Cursor<V> values = cursor<V>(w.values, 0);
  const I* columns = static_cast<const I*>(w.columns);
  const A* bias = static_cast<const A*>(w.bias);
  A* out = static_cast<A*>(t.out);
  int64_t begin = w.start[t.first];
  for (int64_t r = t.first; r < t.last; ++r) {
    const int64_t end = w.start[r + 1];
    float sum = dot(values + begin, columns + begin, static_cast<const float*>(t.x), end - begin);
    if (bias) sum += widen(bias[r]);
    narrow(sum, out + r);
    begin = end;
  }
}

// Lanes are rows of x: one value is multiplied with a contiguous run of x, no gather and no horizontal sum.
template <int L, class V, class A, class I>
void csr_lanes(const sparsec::Task& t) {
  constexpr int W = L < kRegister ? L : kRegister;
  constexpr int N = L / W;
  constexpr int C = N >= 4 ? 2 : 4;  // chains that hide the latency of the multiply-add; N * C accumulators fit the registers
  typedef float Run __attribute__((vector_size(4 * W)));
  const sparsec::Matrix& w = *t.matrix;
  const Cursor<V> values = cursor<V>(w.values, 0);
  const A* bias = static_cast<const A*>(w.bias);
  const float* x = static_cast<const float*>(t.x);
  A* out = static_cast<A*>(t.out);
  int64_t at = w.start[t.first];
  for (int64_t r = t.first; r < t.last; ++r) {
    const int64_t end = w.start[r + 1];
    Columns<I> column{static_cast<const I*>(w.columns)};
    Run sums[C][N] = {};
    for (; at + 8 <= end; at += 8) {
      float v[8];
      widen8(values + at, v);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const float* from = x + column(at + k) * L;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          Run run;
          memcpy(&run, from + n * W, sizeof(run));
          sums[k % C][n] += v[k] * run;
        }
      }
    }
    for (; at < end; ++at) {
      const float v = widen(values[at]);
      const float* from = x + column(at) * L;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        Run run;
        memcpy(&run, from + n * W, sizeof(run));
        sums[0][n] += v * run;
      }
    }
    float lanes[L];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Run sum = sums[0][n];
#pragma GCC unroll 4
      for (int c = 1; c < C; ++c) sum += sums[c][n];
      if (bias) sum += widen(bias[r]);
      memcpy(lanes + n * W, &sum, sizeof(sum));
    }
    for (int64_t token = 0; token < t.tokens; ++token) narrow(lanes[token], out + token * t.out_stride + r);
  }
}

// fp64 is there to be right: no half of the memory, no vector trick.
template <class I>
void csr_double(const sparsec::Task& t) {
  const sparsec::Matrix& w = *t.matrix;
  const double* values = static_cast<const double*>(w.values);
  const double* bias = static_cast<const double*>(w.bias);
  for (int64_t r = t.first; r < t.last; ++r) {
    for (int64_t token = 0; token < t.tokens; ++token) {
      const double* x = static_cast<const double*>(t.x) + token * w.in_features;
      Columns<I> column{static_cast<const I*>(w.columns)};
      double sum = 0.0;
      for (int64_t at = w.start[r]; at < w.start[r + 1]; ++at) sum += values[at] * x[column(at)];
      if (bias) sum += bias[r];
      static_cast<double*>(t.out)[token * t.out_stride + r] = sum;
    }
  }
}

template <class V>
struct CsrDecoder {
  static constexpr bool kDirect = false;
  int64_t at[16], end[16], column[16];

  CsrDecoder() = default;
  CsrDecoder(const sparsec::Matrix& w, int64_t panel) {
    for (int64_t l = 0; l < 16; ++l) {
      const int64_t row = 16 * panel + l;
      const bool exists = row < w.out_features;
      at[l] = exists ? w.start[row] : 0;
      end[l] = exists ? w.start[row + 1] : 0;
      column[l] = 0;
    }
  }

  template <class I>
  void rows(const sparsec::Matrix& w, int64_t begin, int64_t limit, float* to) {
    const Cursor<V> values = cursor<V>(w.values, 0);
    for (int l = 0; l < 16; ++l) {
      Columns<I> read{static_cast<const I*>(w.columns)};
      set(read, column[l]);
      for (; at[l] < end[l]; ++at[l]) {
        const int64_t k = read(at[l]);
        if (k >= limit) break;
        column[l] = k;
        to[16 * (k - begin) + l] = widen(values[at[l]]);
      }
    }
  }

  int64_t decode(const sparsec::Matrix& w, int64_t begin, int64_t limit, float* to, int32_t*, const float**) {
    memset(to, 0, sizeof(float) * 16 * (limit - begin));
    switch (w.index) {
      case sparsec::kUInt16: rows<uint16_t>(w, begin, limit, to); break;
      case sparsec::kInt32: rows<int32_t>(w, begin, limit, to); break;
      default: rows<Delta>(w, begin, limit, to);
    }
    return 1;
  }

 private:
  template <class I>
  static void set(Columns<I>&, int64_t) {}
  static void set(Columns<Delta>& read, int64_t column) { read.column = column; }
};

// One function for all types of columns.
template <class V, class A>
void csr_one_any(const sparsec::Task& t) {
  switch (t.matrix->index) {
    case sparsec::kUInt16: return csr_one<V, A, uint16_t>(t);
    case sparsec::kInt32: return csr_one<V, A, int32_t>(t);
    default: return csr_one<V, A, Delta>(t);
  }
}
template <int L, class V, class A>
void csr_lanes_any(const sparsec::Task& t) {
  switch (t.matrix->index) {
    case sparsec::kUInt16: return csr_lanes<L, V, A, uint16_t>(t);
    case sparsec::kInt32: return csr_lanes<L, V, A, int32_t>(t);
    default: return csr_lanes<L, V, A, Delta>(t);
  }
}
inline void csr_double_any(const sparsec::Task& t) {
  switch (t.matrix->index) {
    case sparsec::kUInt16: return csr_double<uint16_t>(t);
    case sparsec::kInt32: return csr_double<int32_t>(t);
    default: return csr_double<Delta>(t);
  }
}

struct CsrKernels : NoKernels {
  template <class V>
  using Decoder = CsrDecoder<V>;
  template <class V, class A>
  static constexpr sparsec::Kernel one = csr_one_any<V, A>;
  template <int L, class V, class A>
  static constexpr sparsec::Kernel lanes = csr_lanes_any<L, V, A>;
  static constexpr sparsec::Kernel doubles = csr_double_any;
};

}  // namespace
