// The primitives of digits.h with AVX2.
#pragma once
#define SPARSEC_DIGITS
#define SPARSEC_DIGIT_ROWS 2

namespace {

struct Quads {
  __m256i half[2];  // rows 0 to 7, 8 to 15
};
using Table = __m256i;  // two copies
inline Table table_of(const uint8_t* codes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

inline IntSums dot(IntSums sums, const Quads& step, uint32_t x) {
  const __m256i digits = _mm256_set1_epi32(static_cast<int>(x)), one = _mm256_set1_epi16(1);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) sums.v[i] += (IntVec)_mm256_madd_epi16(_mm256_maddubs_epi16(step.half[i], digits), one);
  return sums;
}
inline __m256i load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Quads load8(const uint8_t* from) { return {{load_bytes(from), load_bytes(from + 32)}}; }
// 32 halves of 16 bytes, in order.
inline __m256i codes_of(const uint8_t* from, Table table) {
  const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i halves = _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(table, halves);
}
inline Quads load4(const uint8_t* from, Table table) { return {{codes_of(from, table), codes_of(from + 16, table)}}; }

// Codes of two bytes of a word, those of the second in the upper half, to where its bits are; a code that is not kept is 128.
inline __m128i placed(__m128i codes, uint64_t low, uint64_t high) {
  const __m128i zero = _mm_set1_epi8(-128);
  __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandByte.rows[low]));
  places = _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(places), reinterpret_cast<const double*>(kExpandByteHigh.rows[high])));
  return _mm_or_si128(_mm_shuffle_epi8(codes, places), _mm_and_si128(places, zero));
}
inline Quads joined(const __m128i (&parts)[4]) { return {{_mm256_set_m128i(parts[1], parts[0]), _mm256_set_m128i(parts[3], parts[2])}}; }

inline Quads expand8(const uint8_t* from, uint64_t bits) {
  __m128i parts[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint64_t low = (bits >> (16 * i)) & 255, high = (bits >> (16 * i + 8)) & 255;
    const uint8_t* const second = from + __builtin_popcountll(low);
    __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    codes = _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(codes), reinterpret_cast<const double*>(second)));
    parts[i] = placed(codes, low, high);
    from = second + __builtin_popcountll(high);
  }
  return joined(parts);
}
// Eight halves of bytes from the `at`-th on.
inline uint64_t eight_halves(const uint8_t* from, int at) {
  uint64_t word;
  memcpy(&word, from + at / 2, 8);
  return (word >> (4 * (at % 2))) & 0xffffffffu;
}
inline Quads expand4(const uint8_t* from, uint64_t bits, Table table) {
  __m128i parts[4];
  int at = 0;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint64_t low = (bits >> (16 * i)) & 255, high = (bits >> (16 * i + 8)) & 255;
    const int second = at + __builtin_popcountll(low);
    const uint64_t both = eight_halves(from, at) | eight_halves(from, second) << 32;
    at = second + __builtin_popcountll(high);
    const __m128i bytes = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(static_cast<long long>(both)));
    const __m128i halves = _mm_and_si128(_mm_or_si128(bytes, _mm_slli_epi16(bytes, 4)), _mm_set1_epi8(15));
    parts[i] = placed(_mm_shuffle_epi8(_mm256_castsi256_si128(table), halves), low, high);
  }
  return joined(parts);
}
inline Quads in_half(__m256i codes, int h) { return h ? Quads{{_mm256_setzero_si256(), codes}} : Quads{{codes, _mm256_setzero_si256()}}; }
inline Quads half8(const uint8_t* from, int h) { return in_half(load_bytes(from), h); }
inline Quads half4(const uint8_t* from, Table table, int h) { return in_half(codes_of(from, table), h); }
inline Quads absent(int h) { return in_half(_mm256_set1_epi8(-128), h); }
inline Quads either(const Quads& a, const Quads& b) {
  return {{_mm256_or_si256(a.half[0], b.half[0]), _mm256_or_si256(a.half[1], b.half[1])}};
}
inline Quads ones(uint64_t bits) {
  Quads q;
  const __m256i place = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  for (int i = 0; i < 2; ++i) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(bits >> (32 * i)));
    const __m256i spread = _mm256_shuffle_epi8(word, _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    q.half[i] = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, place), place), _mm256_set1_epi8(1));
  }
  return q;
}
inline void store(uint8_t* to, const Quads& q) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), q.half[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), q.half[1]);
}

}  // namespace
