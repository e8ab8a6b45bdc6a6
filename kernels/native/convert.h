// Half types to fp32 and back, one value at a time: round to nearest even, NaN stays NaN.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) && !defined(SPARSEC_NO_X86)
#include <immintrin.h>
#endif

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// A column of CSR as the distance to the one before it in the row.
struct Delta {
  uint8_t distance;
};

// Where the columns of a row stand: as they are, or as the distance to the one before.
template <class I>
struct Columns {
  const I* at;
  int64_t operator()(int64_t i) { return at[i]; }
};
template <>
struct Columns<Delta> {
  const Delta* at;
  int64_t column = 0;
  int64_t operator()(int64_t i) { return column += at[i].distance; }
};

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
inline float widen(Float16 v) {
#if defined(__F16C__) && !defined(SPARSEC_NO_X86)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // inf, NaN
  if (rest >= 0x0400u) return from_bits(sign | ((rest << 13) + (112u << 23)));          // normal: exponent bias 15 to 127
  const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;            // subnormal: units of 2^-24
  return from_bits(sign | to_bits(magnitude));
#endif
}

inline void narrow(float v, float* out) { *out = v; }
inline void narrow(double v, double* out) { *out = v; }
inline void narrow(float v, BFloat16* out) {
  const uint32_t bits = to_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;  // NaN, so that truncation leaves no inf
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
inline void narrow(float v, Float16* out) {
#if defined(__F16C__) && !defined(SPARSEC_NO_X86)
  out->bits = static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = to_bits(v);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    out->bits = sign | 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to inf
    out->bits = sign | 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves units of 2^-24 in the low bits, rounded by the FPU
    out->bits = static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000u));
  } else {
    out->bits = static_cast<uint16_t>(sign | ((rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13));
  }
#endif
}

}  // namespace
