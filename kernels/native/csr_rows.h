// Row loops of the CSR product, written once for all instruction sets.
//
// The including file defines, in an unnamed namespace, for T in float, BFloat16, Float16 and I in uint16_t, int32_t:
//   float dot(const T* values, const I* columns, const float* x, int64_t nnz)          one row of W times one row of x
//   void widen8(const T* values, float* out)                                            eight values to fp32
#pragma once
#include "convert.h"
#include "kernels.h"

namespace {

using sparsec::Product;

template <class T, class I>
void one(const Product& p) {
  const T* values = static_cast<const T*>(p.values);
  const I* columns = static_cast<const I*>(p.columns);
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out);
  int64_t begin = p.row_ptr[p.first];
  for (int64_t r = p.first; r < p.last; ++r) {
    const int64_t end = p.row_ptr[r + 1];
    float sum = dot(values + begin, columns + begin, static_cast<const float*>(p.x), end - begin);
    if (bias) sum += widen(bias[r]);
    narrow(sum, out + r);
    begin = end;
  }
}

// GCC and clang map a vector type of register width to one register; of a wider one GCC 12 makes stack traffic (5 times
// slower), so that L lanes are an array of registers.
#if defined(__AVX512F__)
constexpr int kRegister = 16;
#elif defined(__AVX2__)
constexpr int kRegister = 8;
#else
constexpr int kRegister = 4;
#endif

// Lanes are rows of x: one value is multiplied with a contiguous run of x, no gather and no horizontal sum.
template <int L, class T, class I>
void few(const Product& p) {
  constexpr int W = L < kRegister ? L : kRegister;
  constexpr int N = L / W;
  constexpr int C = N >= 4 ? 2 : 4;  // chains that hide the latency of the multiply-add; N * C accumulators fit the registers
  typedef float Vec __attribute__((vector_size(4 * W)));
  const T* values = static_cast<const T*>(p.values);
  const I* columns = static_cast<const I*>(p.columns);
  const T* bias = static_cast<const T*>(p.bias);
  const float* x = static_cast<const float*>(p.x);
  T* out = static_cast<T*>(p.out);
  int64_t at = p.row_ptr[p.first];
  for (int64_t r = p.first; r < p.last; ++r) {
    const int64_t end = p.row_ptr[r + 1];
    Vec sums[C][N] = {};
    for (; at + 8 <= end; at += 8) {
      float v[8];
      widen8(values + at, v);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const float* from = x + static_cast<int64_t>(columns[at + k]) * L;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          Vec run;
          memcpy(&run, from + n * W, sizeof(run));
          sums[k % C][n] += v[k] * run;
        }
      }
    }
    for (; at < end; ++at) {
      const float v = widen(values[at]);
      const float* from = x + static_cast<int64_t>(columns[at]) * L;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        Vec run;
        memcpy(&run, from + n * W, sizeof(run));
        sums[0][n] += v * run;
      }
    }
    float lanes[L];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      Vec sum = sums[0][n];
#pragma GCC unroll 4
      for (int c = 1; c < C; ++c) sum += sums[c][n];
      if (bias) sum += widen(bias[r]);
      memcpy(lanes + n * W, &sum, sizeof(sum));
    }
    for (int64_t t = 0; t < p.tokens; ++t) narrow(lanes[t], out + t * p.out_stride + r);
  }
}

// fp64 is there to be right: no half of the memory, no vector trick.
template <class I>
void wide(const Product& p) {
  const double* values = static_cast<const double*>(p.values);
  const I* columns = static_cast<const I*>(p.columns);
  const double* bias = static_cast<const double*>(p.bias);
  for (int64_t r = p.first; r < p.last; ++r) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      const double* x = static_cast<const double*>(p.x) + t * p.in_features;
      double sum = 0.0;
      for (int64_t at = p.row_ptr[r]; at < p.row_ptr[r + 1]; ++at) sum += values[at] * x[columns[at]];
      if (bias) sum += bias[r];
      static_cast<double*>(p.out)[t * p.out_stride + r] = sum;
    }
  }
}

#define SPARSEC_BY_INDEX(function) \
  { function<uint16_t>, function<int32_t> }
#define SPARSEC_BY_VALUE(...)                                                             \
  {                                                                                       \
    {__VA_ARGS__ float, uint16_t>, __VA_ARGS__ float, int32_t> },                         \
        {__VA_ARGS__ BFloat16, uint16_t>, __VA_ARGS__ BFloat16, int32_t> },               \
        {__VA_ARGS__ Float16, uint16_t>, __VA_ARGS__ Float16, int32_t> }, SPARSEC_BY_INDEX(wide) \
  }
// The whole table of one instruction set.
#define SPARSEC_TABLE(name)                                                                                     \
  {                                                                                                             \
    name, SPARSEC_BY_VALUE(one<), {                                                                             \
      SPARSEC_BY_VALUE(few<4,), SPARSEC_BY_VALUE(few<8,), SPARSEC_BY_VALUE(few<16,), SPARSEC_BY_VALUE(few<32,) \
    }                                                                                                           \
  }

}  // namespace
