// The primitives of digits.h with AVX-512 VBMI2 and VNNI, which CPUs have together.
#pragma once
#define SPARSEC_DIGITS __attribute__((target("avx512vbmi2,avx512vnni")))
#define SPARSEC_DIGIT_ROWS 8

namespace {

using Quads = __m512i;
using Table = __m512i;  // four copies
inline Table table_of(const uint8_t* codes) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

SPARSEC_DIGITS inline IntSums dot(const IntSums& sums, Quads step, uint32_t x) {
  return IntSums{{(IntVec)_mm512_dpbusd_epi32((__m512i)sums.v[0], step, _mm512_set1_epi32(static_cast<int>(x)))}};
}
SPARSEC_DIGITS inline Quads load8(const uint8_t* from) { return _mm512_loadu_si512(from); }
SPARSEC_DIGITS inline Quads codes_of(const uint8_t* from, Table table) {
  const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  const __m512i halves = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)), _mm512_set1_epi8(15));
  return _mm512_shuffle_epi8(table, halves);
}
SPARSEC_DIGITS inline Quads load4(const uint8_t* from, Table table) { return codes_of(from, table); }
SPARSEC_DIGITS inline Quads expand8(const uint8_t* from, uint64_t bits) {
  return _mm512_mask_expand_epi8(_mm512_set1_epi8(-128), bits, _mm512_loadu_si512(from));
}
SPARSEC_DIGITS inline Quads expand4(const uint8_t* from, uint64_t bits, Table table) {
  return _mm512_mask_expand_epi8(_mm512_set1_epi8(-128), bits, codes_of(from, table));
}
SPARSEC_DIGITS inline Quads in_half(__m256i codes, int h) { return _mm512_maskz_broadcast_i64x4(static_cast<__mmask8>(h ? 0xf0 : 0x0f), codes); }
SPARSEC_DIGITS inline Quads half8(const uint8_t* from, int h) { return in_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), h); }
SPARSEC_DIGITS inline Quads half4(const uint8_t* from, Table table, int h) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i halves = _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
  return in_half(_mm256_shuffle_epi8(_mm512_castsi512_si256(table), halves), h);
}
SPARSEC_DIGITS inline Quads absent(int h) { return in_half(_mm256_set1_epi8(-128), h); }
SPARSEC_DIGITS inline Quads either(Quads a, Quads b) { return _mm512_or_si512(a, b); }
SPARSEC_DIGITS inline Quads ones(uint64_t bits) { return _mm512_maskz_set1_epi8(bits, 1); }
SPARSEC_DIGITS inline void store(uint8_t* to, Quads q) { _mm512_storeu_si512(to, q); }

}  // namespace
