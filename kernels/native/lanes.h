// Sixteen fp32 numbers, one per output row of a panel, in the registers of the instruction set at hand.
//
// GCC and clang map a vector type of register width to one register; of a wider one GCC 12 makes stack traffic (5 times
// slower), so that more lanes are an array of registers.
#pragma once
#include <stdint.h>
#include <string.h>

#include "values.h"

namespace {

#if defined(__AVX512F__) || defined(SPARSEC_SIMDE)
constexpr int kRegister = 16;
#elif defined(__AVX2__)
constexpr int kRegister = 8;
#else
constexpr int kRegister = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kRegister)));
typedef uint32_t LaneBits __attribute__((vector_size(4 * kRegister)));

inline Vec load_vec(const float* from) {
  Vec v;
  memcpy(&v, from, sizeof(v));
  return v;
}
inline void store_vec(float* to, Vec v) { memcpy(to, &v, sizeof(v)); }

inline float sum_of(Vec v) {
  float s[kRegister];
  store_vec(s, v);
  for (int width = kRegister / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) s[l] += s[l + width];
  return s[0];
}

constexpr int kRegisters = 16 / kRegister;
struct Lanes {
  Vec v[kRegisters];
};

inline Lanes zero_lanes() { return Lanes{}; }
inline Lanes load_lanes(const float* from) {
  Lanes l;
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) l.v[i] = load_vec(from + i * kRegister);
  return l;
}
inline void store_lanes(float* to, const Lanes& l) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) store_vec(to + i * kRegister, l.v[i]);
}
inline void add_product(Lanes& sum, const Lanes& w, float x) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) sum.v[i] += w.v[i] * x;
}
inline void add_product(Lanes& sum, const Lanes& w, const Lanes& x) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) sum.v[i] += w.v[i] * x.v[i];
}
inline Lanes add(const Lanes& a, const Lanes& b) {
  Lanes s;
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) s.v[i] = a.v[i] + b.v[i];
  return s;
}

inline void load_step(const float* at, Lanes (&columns)[1]) { columns[0] = load_lanes(at); }

// A lane's first column stands in the lower half of its 32 bits.
inline void load_step(const BFloat16* at, Lanes (&columns)[2]) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) {
    LaneBits lanes;
    memcpy(&lanes, at + 2 * kRegister * i, sizeof(lanes));
    columns[0].v[i] = (Vec)(lanes << 16);
    columns[1].v[i] = (Vec)(lanes & 0xffff0000u);
  }
}

// Half of them, in whatever registers.
typedef float Eight __attribute__((vector_size(32)));
typedef uint32_t EightBits __attribute__((vector_size(32)));
inline Eight load_eight(const float* at) {
  Eight e;
  memcpy(&e, at, sizeof(e));
  return e;
}
inline void load_half(const BFloat16* at, Eight (&columns)[2]) {
  EightBits lanes;
  memcpy(&lanes, at, sizeof(lanes));
  columns[0] = (Eight)(lanes << 16);
  columns[1] = (Eight)(lanes & 0xffff0000u);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// All 16 of them: bias (which may be null), rounding, storing.
inline void store_all(const Lanes& sum, const float* bias, float* out) { store_lanes(out, bias ? add(sum, load_lanes(bias)) : sum); }
template <class T>
inline void store_all(const Lanes& sum, const T* bias, T* out) {
  float s[16];
  store_lanes(s, sum);
  for (int l = 0; l < 16; ++l) narrow(bias ? s[l] + widen(bias[l]) : s[l], out + l);
}

// The sums of output rows [row, row + 16) of which `count` exist.
template <class T>
inline void finish(const Lanes& sum, const T* bias, int64_t row, int64_t count, T* out) {
  if (count == 16) return store_all(sum, bias ? bias + row : nullptr, out + row);
  float s[16];
  store_lanes(s, sum);
  for (int64_t l = 0; l < count; ++l) narrow(bias ? s[l] + widen(bias[row + l]) : s[l], out + row + l);
}

// What a format has no kernel of its own for. Each names `Decoder<V>` (panels.h), which serves many rows of x, and `one`.
struct NoKernels {
  template <class V, class A>
  static constexpr sparsec::Kernel rows = nullptr;
  template <int L, class V, class A>
  static constexpr sparsec::Kernel lanes = nullptr;
  static constexpr sparsec::Kernel doubles = nullptr;  // fp64
};

}  // namespace
