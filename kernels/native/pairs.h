// Two columns of a bf16 bitmap panel at a time, for CPUs that expand 16-bit lanes (AVX-512 VBMI2): their bits are one mask of 32, their values
// follow each other.
#pragma once
#include "bitmap.h"

#if defined(SPARSEC_SIMDE)
#define bitmap_one_pairs bitmap_one<BFloat16, BFloat16>
#else
#define SPARSEC_VBMI2 __attribute__((target("avx512vbmi2")))

namespace {

// Columns of one panel. Whole loads stay inside the values; the last of them are read under a mask.
struct PairReader {
  const BFloat16* next;
  const BFloat16* last;  // that 32 values may be read from

  PairReader(const sparsec::Matrix& w, const BFloat16* values)
      : next(values), last(static_cast<const BFloat16*>(w.values) + w.stored - 32) {}

  // 16 lanes of the first column, then 16 of the second.
  SPARSEC_VBMI2 inline __m512i take(uint32_t bits) {
    asm("" : "+r"(bits));  // in a general register: GCC would load a mask register and move it back to count
    const int count = __builtin_popcount(bits);
    const __m512i values = __builtin_expect(next <= last, 1)
                               ? _mm512_loadu_si512(next)
                               : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), next);
    __builtin_prefetch(reinterpret_cast<const char*>(next) + kBitmapAhead);
    next += count;
    return _mm512_maskz_expand_epi16(bits, values);
  }
};

inline uint32_t two_masks(const uint16_t* bits) {
  uint32_t two;
  memcpy(&two, bits, 4);
  return two;
}

// sums[0] += even lanes, sums[1] += odd lanes; the first half of each is of the first column, the second of the second.
SPARSEC_VBMI2 inline void add_pair(__m512 (&sums)[2], __m512i lanes, const float* first, const float* second) {
  const __m512 x = _mm512_mask_broadcastss_ps(_mm512_set1_ps(*first), 0xff00, _mm_load_ss(second));
  sums[0] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16)), x, sums[0]);
  const __m512i odd = _mm512_and_si512(lanes, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  sums[1] = _mm512_fmadd_ps(_mm512_castsi512_ps(odd), x, sums[1]);
}

SPARSEC_VBMI2 void bitmap_one_pairs(const sparsec::Task& t) {
  const sparsec::Matrix& w = *t.matrix;
  const float* x = static_cast<const float*>(t.x);
  const int64_t in = w.in_features;
  const uint16_t* bits = static_cast<const uint16_t*>(w.columns) + t.first * in;
  PairReader reader(w, static_cast<const BFloat16*>(w.values) + w.start[t.first]);
  for (int64_t p = t.first; p < t.last; ++p, bits += in) {
    __m512 a[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, b[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t k = 0;
    for (; k + 4 <= in; k += 4) {
      __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kBitmapAhead);
      add_pair(a, reader.take(two_masks(bits + k)), x + k, x + k + 1);
      add_pair(b, reader.take(two_masks(bits + k + 2)), x + k + 2, x + k + 3);
    }
    for (; k + 2 <= in; k += 2) add_pair(a, reader.take(two_masks(bits + k)), x + k, x + k + 1);
    if (k < in) add_pair(a, reader.take(bits[k]), x + k, x + k);
    alignas(64) float sums[2][16];
    for (int i = 0; i < 2; ++i) _mm512_store_ps(sums[i], _mm512_add_ps(a[i], b[i]));
    float lanes[16];
    for (int l = 0; l < 16; ++l) lanes[l] = sums[l % 2][l / 2] + sums[l % 2][8 + l / 2];
    finish(load_lanes(lanes), static_cast<const BFloat16*>(w.bias), 16 * p, least(16, w.out_features - 16 * p),
           static_cast<BFloat16*>(t.out));
  }
}

}  // namespace
#endif
