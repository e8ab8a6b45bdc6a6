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

// GCC and clang lower a vector type to whatever registers there are: 16 floats are one AVX-512, two AVX2 or four NEON ones.
template <int L>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * L)));
};

template <int L>
inline typename Lanes<L>::type load(const float* from) {
  typename Lanes<L>::type v;
  memcpy(&v, from, sizeof(v));
  return v;
}

// Lanes are rows of x: one value is multiplied with a contiguous run of x, no gather and no horizontal sum.
template <int L, class T, class I>
void few(const Product& p) {
  using Vec = typename Lanes<L>::type;
  const T* values = static_cast<const T*>(p.values);
  const I* columns = static_cast<const I*>(p.columns);
  const T* bias = static_cast<const T*>(p.bias);
  const float* x = static_cast<const float*>(p.x);
  T* out = static_cast<T*>(p.out);
  int64_t at = p.row_ptr[p.first];
  for (int64_t r = p.first; r < p.last; ++r) {
    const int64_t end = p.row_ptr[r + 1];
    Vec a{}, b{}, c{}, d{};  // four chains hide the latency of the multiply-add
    for (; at + 8 <= end; at += 8) {
      float v[8];
      widen8(values + at, v);
      const I* col = columns + at;
      a += v[0] * load<L>(x + static_cast<int64_t>(col[0]) * L);
      b += v[1] * load<L>(x + static_cast<int64_t>(col[1]) * L);
      c += v[2] * load<L>(x + static_cast<int64_t>(col[2]) * L);
      d += v[3] * load<L>(x + static_cast<int64_t>(col[3]) * L);
      a += v[4] * load<L>(x + static_cast<int64_t>(col[4]) * L);
      b += v[5] * load<L>(x + static_cast<int64_t>(col[5]) * L);
      c += v[6] * load<L>(x + static_cast<int64_t>(col[6]) * L);
      d += v[7] * load<L>(x + static_cast<int64_t>(col[7]) * L);
    }
    for (; at < end; ++at) a += widen(values[at]) * load<L>(x + static_cast<int64_t>(columns[at]) * L);
    Vec sum = (a + b) + (c + d);
    if (bias) sum += widen(bias[r]);
    float lanes[L];
    memcpy(lanes, &sum, sizeof(sum));
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
