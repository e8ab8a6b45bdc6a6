// What stands between products: arithmetic on rows of fp32 numbers, for chains (chain.h).
#pragma once
#include "lanes.h"

namespace {

typedef int32_t Bits __attribute__((vector_size(4 * kRegister)));

// Minus and not plus: 0 + -0 is 0, and -0 has to stay.
inline Vec same(float v) { return v - Vec{}; }
inline Bits bits_of(Vec v) {
  Bits b;
  memcpy(&b, &v, sizeof(b));
  return b;
}
inline Vec of_bits(Bits b) {
  Vec v;
  memcpy(&v, &b, sizeof(v));
  return v;
}
// Lane by lane; mask as comparisons give it.
inline Vec choose(Bits mask, Vec yes, Vec no) { return of_bits((mask & bits_of(yes)) | (~mask & bits_of(no))); }
// NaN, in either, stays.
inline Vec larger(Vec a, Vec b) { return choose((a > b) | (a != a), a, b); }
inline Vec smaller(Vec a, Vec b) { return choose((a < b) | (a != a), a, b); }

// e**x within 2 units in the last place; 0 below -104, inf above 88.8, NaN stays. 2**n * e**r with |r| <= ln(2) / 2: the polynomial is
// that of Cephes' expf; 2**n in two factors, for results that are subnormal.
inline Vec exponential(Vec x) {
  const Vec in = smaller(larger(x, same(-104.0f)), same(89.0f));
  const Vec shifted = in * 1.44269504088896341f + same(12582912.0f);  // 1.5 * 2**23: the nearest integer is in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (in - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = same(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec e = p * r * r + r + 1.0f;
  const Bits whole = __builtin_convertvector(choose(x != x, Vec{}, n), Bits), half = whole >> 1;
  const Vec scaled = e * of_bits((half + 127) << 23) * of_bits((whole - half + 127) << 23);
  return choose(x != x, x, scaled);
}

// Rational approximations of Eigen (MathFunctionsImpl.h): within 4e-7 of the value.
inline Vec hyperbolic_tangent(Vec v) {
  const Vec x = smaller(larger(v, same(-7.90531110763549805f)), same(7.90531110763549805f)), z = x * x;
  Vec p = same(-2.76076847742355e-16f);
  p = p * z + 2.00018790482477e-13f;
  p = p * z + -8.60467152213735e-11f;
  p = p * z + 5.12229709037114e-08f;
  p = p * z + 1.48572235717979e-05f;
  p = p * z + 6.37261928875436e-04f;
  p = p * z + 4.89352455891786e-03f;
  Vec q = same(1.19825839466702e-06f);
  q = q * z + 1.18534705686654e-04f;
  q = q * z + 2.26843463243900e-03f;
  q = q * z + 4.89352518554385e-03f;
  return x * p / q;
}
inline Vec error_function(Vec v) {
  const Vec x = smaller(larger(v, same(-4.0f)), same(4.0f)), z = x * x;
  Vec p = same(-2.72614225801306e-10f);
  p = p * z + 2.77068142495902e-08f;
  p = p * z + -2.10102402082508e-06f;
  p = p * z + -5.69250639462346e-05f;
  p = p * z + -7.34990630326855e-04f;
  p = p * z + -2.95459980854025e-03f;
  p = p * z + -1.60960333262415e-02f;
  Vec q = same(-1.45660718464996e-05f);
  q = q * z + -2.13374055278905e-04f;
  q = q * z + -1.68282697438203e-03f;
  q = q * z + -7.37332916720468e-03f;
  q = q * z + -1.42647390514189e-02f;
  return x * p / q;
}

template <class F>
inline Vec one_by_one(Vec x, F f) {
  float v[kRegister];
  store_vec(v, x);
  for (int l = 0; l < kRegister; ++l) v[l] = f(v[l]);
  return load_vec(v);
}

inline Vec square_root(Vec x) {
  return one_by_one(x, [](float v) { return __builtin_sqrtf(v); });
}

// Whole registers: past the last row there is room for one, and rows are written in order.
template <class F>
void each(const sparsec::ElementTask& t, F f) {
  for (int64_t row = 0; row < t.rows; ++row) {
    const float* a = t.a.from + row * t.a.row_stride;
    const float* b = t.b.from + row * t.b.row_stride;
    float* out = t.out + row * t.width;
    if (t.a.one && t.b.one) {
      const Vec v = f(same(*a), same(*b));
      for (int64_t i = 0; i < t.width; i += kRegister) store_vec(out + i, v);
    } else if (t.a.one) {
      const Vec v = same(*a);
      for (int64_t i = 0; i < t.width; i += kRegister) store_vec(out + i, f(v, load_vec(b + i)));
    } else if (t.b.one) {
      const Vec v = same(*b);
      for (int64_t i = 0; i < t.width; i += kRegister) store_vec(out + i, f(load_vec(a + i), v));
    } else {
      for (int64_t i = 0; i < t.width; i += kRegister) store_vec(out + i, f(load_vec(a + i), load_vec(b + i)));
    }
  }
}

template <class F>
float total(const float* a, int64_t width, F f) {
  Vec sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kRegister <= width; i += 2 * kRegister) {
    sums[0] += f(load_vec(a + i));
    sums[1] += f(load_vec(a + i + kRegister));
  }
  float sum = sum_of(sums[0] + sums[1]);
  for (; i < width; ++i) sum += f(same(a[i]))[0];
  return sum;
}

// One number per row of a.
inline void reduce(const sparsec::ElementTask& t) {
  const float count = static_cast<float>(t.a.width);
  for (int64_t row = 0; row < t.rows; ++row) {
    const float* a = t.a.from + row * t.a.row_stride;
    const float mean = total(a, t.a.width, [](Vec v) { return v; }) / count;
    t.out[row] = mean;
    if (t.op == sparsec::kVariance)
      t.out[row] = total(a, t.a.width, [mean](Vec v) { return (v - mean) * (v - mean); }) / count;
  }
}

template <class T>
void widen_many(const void* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const T*>(from)[i]);
}
template <class T>
void narrow_many(const float* from, void* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], static_cast<T*>(to) + i);
}
template <class T>
void round_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    T rounded;
    narrow(values[i], &rounded);
    values[i] = widen(rounded);
  }
}

void elementwise(const sparsec::ElementTask& t) {
  using namespace sparsec;
  switch (t.op) {
    case kAdd: each(t, [](Vec a, Vec b) { return a + b; }); break;
    case kSubtract: each(t, [](Vec a, Vec b) { return a - b; }); break;
    case kMultiply: each(t, [](Vec a, Vec b) { return a * b; }); break;
    case kDivide: each(t, [](Vec a, Vec b) { return a / b; }); break;
    case kMaximum: each(t, [](Vec a, Vec b) { return choose(b != b, b, larger(a, b)); }); break;
    case kMinimum: each(t, [](Vec a, Vec b) { return choose(b != b, b, smaller(a, b)); }); break;
    case kCopy: each(t, [](Vec a, Vec) { return a; }); break;
    case kNegate: each(t, [](Vec a, Vec) { return -a; }); break;
    case kExp: each(t, [](Vec a, Vec) { return exponential(a); }); break;
    case kSigmoid: each(t, [](Vec a, Vec) { return 1.0f / (1.0f + exponential(-a)); }); break;
    case kTanh: each(t, [](Vec a, Vec) { return hyperbolic_tangent(a); }); break;
    case kErf: each(t, [](Vec a, Vec) { return error_function(a); }); break;
    case kSqrt: each(t, [](Vec a, Vec) { return square_root(a); }); break;
    case kRsqrt: each(t, [](Vec a, Vec) { return 1.0f / square_root(a); }); break;
    case kCos: each(t, [](Vec a, Vec) { return one_by_one(a, [](float v) { return __builtin_cosf(v); }); }); break;
    case kSin: each(t, [](Vec a, Vec) { return one_by_one(a, [](float v) { return __builtin_sinf(v); }); }); break;
    case kRelu: each(t, [](Vec a, Vec) { return larger(a, Vec{}); }); break;
    default: reduce(t);
  }
  const int64_t count = t.rows * t.width;
  if (t.type == kBFloat16) round_all<BFloat16>(t.out, count);
  if (t.type == kFloat16) round_all<Float16>(t.out, count);
}

}  // namespace
