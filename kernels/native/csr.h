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

// Codes, two in a byte where they have 4 bits, as numbers.
inline float coded_number(const sparsec::Matrix& w, int64_t at) {
  const uint8_t* const codes = static_cast<const uint8_t*>(w.values);
  const int code = w.bits == 8 ? codes[at] : w.table[codes[at / 2] >> 4 * (at % 2) & 15];
  return static_cast<float>(code - 128);
}
// What a row's numbers are multiplied with, and what is added, up to the column that its group ends before.
struct RowScale {
  const sparsec::Matrix& w;
  const uint16_t* scales;  // of the first group
  int64_t next = 0;
  float scale = 0.0f, middle = 0.0f;

  RowScale(const sparsec::Matrix& matrix, int64_t row)
      : w(matrix), scales(w.scale + row / 16 * w.groups * (1 + w.middle) * 16 + row % 16) {}
  // Of columns that ascend.
  void reach(int64_t column) {
    const int64_t group = w.group ? column / w.group : 0;
    const uint16_t* const own = scales + group * (1 + w.middle) * 16;
    next = w.group ? (group + 1) * w.group : w.in_features;
    scale = from_bits(static_cast<uint32_t>(own[0]) << 16);
    middle = w.middle ? from_bits(static_cast<uint32_t>(own[16]) << 16) : 0.0f;
  }
};

// The scales and middles of a row whose groups are 2^shift columns, one after the other.
struct RowScales {
  static constexpr int64_t kMost = 1024;
  float scale[kMost], middle[kMost];
  int shift = -1;  // there are more, or of other sizes

  explicit RowScales(const sparsec::Matrix& w) {
    for (int s = 5; s < 16; ++s)
      if (w.groups <= kMost && w.group == int64_t{1} << s) shift = s;
  }
  void read(const sparsec::Matrix& w, int64_t row) {
    const int64_t step = (1 + w.middle) * 16;
    const uint16_t* const from = w.scale + row / 16 * w.groups * step + row % 16;
    for (int64_t g = 0; g < w.groups; ++g) {
      scale[g] = from_bits(static_cast<uint32_t>(from[g * step]) << 16);
      middle[g] = w.middle ? from_bits(static_cast<uint32_t>(from[g * step + 16]) << 16) : 0.0f;
    }
  }
};

template <class A, class I>
void csr_codes_of(const sparsec::Task& t) {
  constexpr int64_t kRun = 256;
  const sparsec::Matrix& w = *t.matrix;
  const uint8_t* const codes = static_cast<const uint8_t*>(w.values);
  const A* bias = static_cast<const A*>(w.bias);
  float values[kRun], numbers[16];
  int32_t columns[kRun];
  for (int i = 0; w.bits == 4 && i < 16; ++i) numbers[i] = static_cast<float>(w.table[i] - 128);
  RowScales all(w);
  for (int64_t r = t.first; r < t.last; ++r) {
    RowScale row(w, r);
    if (all.shift >= 0) all.read(w, r);
    Columns<I> column{static_cast<const I*>(w.columns)};
    float sums[sparsec::kFewCodedRows] = {};
    for (int64_t at = w.start[r]; at < w.start[r + 1];) {
      const int64_t count = least(kRun, w.start[r + 1] - at);
      for (int64_t i = 0; i < count; ++i) columns[i] = static_cast<int32_t>(column(at + i));
      if (w.bits == 8)
        for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(codes[at + i] - 128);
      else
        for (int64_t i = 0; i < count; ++i) values[i] = numbers[codes[(at + i) / 2] >> 4 * ((at + i) % 2) & 15];
      if (all.shift >= 0) {
        for (int64_t i = 0; i < count; ++i) values[i] = values[i] * all.scale[columns[i] >> all.shift] + all.middle[columns[i] >> all.shift];
      } else if (!w.group) {
        row.reach(0);
        for (int64_t i = 0; i < count; ++i) values[i] = values[i] * row.scale + row.middle;
      } else {
        for (int64_t i = 0; i < count; ++i) {
          if (columns[i] >= row.next) row.reach(columns[i]);
          values[i] = values[i] * row.scale + row.middle;
        }
      }
      at += count;
      for (int64_t token = 0; token < t.tokens; ++token)
        sums[token] += dot(static_cast<const float*>(values), static_cast<const int32_t*>(columns),
                           static_cast<const float*>(t.x) + token * w.in_features, count);
    }
    for (int64_t token = 0; token < t.tokens; ++token)
      narrow(bias ? sums[token] + widen(bias[r]) : sums[token], static_cast<A*>(t.out) + token * t.out_stride + r);
  }
}
template <class A>
void csr_codes_as(const sparsec::Task& t) {
  switch (t.matrix->index) {
    case sparsec::kUInt16: return csr_codes_of<A, uint16_t>(t);
    case sparsec::kInt32: return csr_codes_of<A, int32_t>(t);
    default: return csr_codes_of<A, Delta>(t);
  }
}
// Up to kFewCodedRows rows of x.
void csr_codes(const sparsec::Task& t) {
  switch (t.matrix->type) {
    case sparsec::kFloat32: return csr_codes_as<float>(t);
    case sparsec::kBFloat16: return csr_codes_as<BFloat16>(t);
    default: return csr_codes_as<Float16>(t);
  }
}

// What is stored, by place, of row `row` and column `column`.
template <class V>
struct PlainEntries {
  Cursor<V> values;
  PlainEntries(const sparsec::Matrix& w, int64_t) : values(cursor<V>(w.values, 0)) {}
  float operator()(int64_t at, int64_t) const { return widen(values[at]); }
};

struct CodedEntries {
  RowScale row;
  CodedEntries(const sparsec::Matrix& w, int64_t r) : row(w, r) {}
  float operator()(int64_t at, int64_t column) {
    if (column >= row.next) row.reach(column);
    return coded_number(row.w, at) * row.scale + row.middle;
  }
};

template <class Entries>
struct CsrEntriesDecoder {
  static constexpr bool kDirect = false;
  int64_t at[16], end[16], column[16], panel;

  CsrEntriesDecoder() = default;
  CsrEntriesDecoder(const sparsec::Matrix& w, int64_t p) : panel(p) {
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
    for (int l = 0; l < 16; ++l) {
      if (at[l] == end[l]) continue;
      Entries value(w, 16 * panel + l);
      Columns<I> read{static_cast<const I*>(w.columns)};
      set(read, column[l]);
      for (; at[l] < end[l]; ++at[l]) {
        const int64_t k = read(at[l]);
        if (k >= limit) break;
        column[l] = k;
        to[16 * (k - begin) + l] = value(at[l], k);
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

template <class V>
using CsrDecoder = CsrEntriesDecoder<PlainEntries<V>>;
using CsrCodesDecoder = CsrEntriesDecoder<CodedEntries>;

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
