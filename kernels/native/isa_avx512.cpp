// AVX-512 F, BW, DQ, VL with FMA and F16C.
//
// Written with the intrinsics that SIMDe emulates, so that the tests can run this very file on a CPU without AVX-512
// (-DSPARSEC_SIMDE): gathers are therefore two of eight lanes, which cost the same as one of sixteen.
#if defined(SPARSEC_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#endif
#include <immintrin.h>

#include "lanes.h"

namespace {

inline __m256 wide8(__m128i bits, const BFloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 wide8(__m128i bits, const Float16*) { return _mm256_cvtph_ps(bits); }

inline __m256 load8(const float* v) { return _mm256_loadu_ps(v); }
template <class T>
inline __m256 load8(const T* v) {
  return wide8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v)), v);
}

inline __m512 join(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

#if defined(SPARSEC_SIMDE)  // which has no 512-bit form of these
template <class T>
inline __m512 values16(const T* v) {
  return join(load8(v), load8(v + 8));
}
#else
inline __m512 values16(const float* v) { return _mm512_loadu_ps(v); }
inline __m512 values16(const BFloat16* v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))), 16));
}
inline __m512 values16(const Float16* v) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)));
}
#endif

inline Vec as_vec(__m512 v) {
  Vec lanes;
  memcpy(&lanes, &v, sizeof(lanes));
  return lanes;
}

typedef double Unaligned __attribute__((aligned(4), may_alias));

// ---- CSR

inline __m256 pick8(const float* x, const uint16_t* columns) {
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(c), 4);
}
inline __m256 pick8(const float* x, const int32_t* columns) {
  return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)), 4);
}

constexpr int64_t kAhead = 512;

inline float sum8(__m256 s) {
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float sum16(__m512 a) {
  return sum8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1))));
}

template <class C, class I>
float dot(C values, const I* columns, const float* x, int64_t nnz) {
  __m512 a = _mm512_setzero_ps(), b = a;
  int64_t at = 0;
  for (; at + 32 <= nnz; at += 32) {
    _mm_prefetch(address(values + (at + kAhead)), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(columns + at) + kAhead * sizeof(I), _MM_HINT_T0);
    a = _mm512_fmadd_ps(values16(values + at), join(pick8(x, columns + at), pick8(x, columns + at + 8)), a);
    b = _mm512_fmadd_ps(values16(values + at + 16), join(pick8(x, columns + at + 16), pick8(x, columns + at + 24)), b);
  }
  a = _mm512_add_ps(a, b);
  __m256 s = _mm256_setzero_ps();
  for (; at + 8 <= nnz; at += 8) s = _mm256_fmadd_ps(load8(values + at), pick8(x, columns + at), s);
  float sum = sum16(a) + sum8(s);
  for (; at < nnz; ++at) sum += widen(values[at]) * x[columns[at]];
  return sum;
}

// Columns of 8 distances after `last`, which holds the column before in all lanes.
inline __m128i columns8(const Delta* distances, __m128i last) {
  __m128i c = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(distances)));
  c = _mm_add_epi16(c, _mm_slli_si128(c, 2));
  c = _mm_add_epi16(c, _mm_slli_si128(c, 4));
  c = _mm_add_epi16(c, _mm_slli_si128(c, 8));
  return _mm_add_epi16(c, last);
}

template <class C>
float dot(C values, const Delta* distances, const float* x, int64_t nnz) {
  const __m128i last_lane = _mm_set1_epi16(0x0f0e);
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  __m128i last = _mm_setzero_si128();
  int64_t at = 0;
  for (; at + 16 <= nnz; at += 16) {
    _mm_prefetch(address(values + (at + kAhead)), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(distances + at) + kAhead, _MM_HINT_T0);
    for (int h = 0; h < 2; ++h) {
      const __m128i columns = columns8(distances + at + 8 * h, last);
      last = _mm_shuffle_epi8(columns, last_lane);
      const __m256 picked = _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(columns), 4);
      sums[h] = _mm256_fmadd_ps(load8(values + at + 8 * h), picked, sums[h]);
    }
  }
  float sum = sum8(_mm256_add_ps(sums[0], sums[1]));
  uint16_t column = static_cast<uint16_t>(_mm_cvtsi128_si32(last));
  for (; at < nnz; ++at) {
    column = static_cast<uint16_t>(column + distances[at].distance);
    sum += widen(values[at]) * x[column];
  }
  return sum;
}

template <class C>
void widen8(C at, float* out) {
  _mm256_storeu_ps(out, load8(at));
}

// ---- lanes

template <class C>
inline Vec load_wide(C at) {
  return as_vec(values16(at));
}
#if defined(SPARSEC_SIMDE)  // which has no expand of 16 lanes
inline __m512 expand(uint32_t bits, __m512 v) {
  float from[16], to[16];
  _mm512_storeu_ps(from, v);
  for (int l = 0, next = 0; l < 16; ++l) to[l] = (bits >> l) & 1 ? from[next++] : 0.0f;
  return _mm512_loadu_ps(to);
}
#else
// In registers, after a load: the form that reads memory is slow on some CPUs.
inline __m512 expand(uint32_t bits, __m512 v) {
  asm("" : "+v"(v));  // GCC would choose it
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), v);
}
#endif

inline void expand(const float* values, uint32_t bits, Lanes (&columns)[1]) {
  columns[0] = Lanes{{as_vec(expand(bits, values16(values)))}};
}
template <class V>
struct Sums {
  Lanes lanes;
};
inline void add_step(Sums<float>& sums, const float* values, uint32_t bits, const float* x) {
  sums.lanes.v[0] += as_vec(expand(bits, values16(values))) * *x;
}
inline Lanes total(const Sums<float>& sums) { return sums.lanes; }

// Eight lanes of two columns in a register, as they stand in memory.
inline Vec both_columns(const float* x) {
  return as_vec(_mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const Unaligned*>(x))));
}
template <class V>
struct PairSums {
  Vec eights[2];
};
template <>
struct Sums<BFloat16> : PairSums<BFloat16> {};
template <>
struct Sums<Float16> : PairSums<Float16> {};
template <class V>
inline void add_step(PairSums<V>& sums, const V* values, uint32_t bits, const float* x) {
  const Vec pair = both_columns(x);
  sums.eights[0] += as_vec(expand(bits & 0xffff, values16(values))) * pair;
  sums.eights[1] += as_vec(expand(bits >> 16, values16(values + __builtin_popcount(bits & 0xffff)))) * pair;
}
inline void apart(const Vec (&eights)[2], Lanes (&columns)[2]) {
#if defined(__clang__)
  columns[0].v[0] = __builtin_shufflevector(eights[0], eights[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  columns[1].v[0] = __builtin_shufflevector(eights[0], eights[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  const LaneBits even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  columns[0].v[0] = __builtin_shuffle(eights[0], eights[1], even);
  columns[1].v[0] = __builtin_shuffle(eights[0], eights[1], even + 1);
#endif
}
template <class V>
inline Lanes total(const PairSums<V>& sums) {
  Lanes columns[2];
  apart(sums.eights, columns);
  return add(columns[0], columns[1]);
}
template <class C>
inline void expand(C values, uint32_t bits, Lanes (&columns)[2]) {
  const Vec eights[2] = {as_vec(expand(bits & 0xffff, values16(values))),
                         as_vec(expand(bits >> 16, values16(values + __builtin_popcount(bits & 0xffff))))};
  apart(eights, columns);
}
inline void load_step(const Float16* at, Lanes (&columns)[2]) {
  const Vec eights[2] = {load_wide(at), load_wide(at + 16)};
  apart(eights, columns);
}
inline void load_half(const Float16* at, Eight (&columns)[2]) {
  const __m256 low = load8(at), high = load8(at + 8);
  const __m256 first = _mm256_shuffle_ps(low, high, 0x88), second = _mm256_shuffle_ps(low, high, 0xdd);
  columns[0] = (Eight)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(first), 0xd8));
  columns[1] = (Eight)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(second), 0xd8));
}

inline Lanes select4(const float* x, const uint8_t* positions) {
  uint32_t p;
  memcpy(&p, positions, 4);
  const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  // Four lane bits count: the two above those of the position choose among copies of the same four numbers.
  const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
  return Lanes{{as_vec(_mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(p)), shift), four))}};
}

inline Lanes select8(const float* x, const uint8_t* positions) {
  uint32_t p, q;
  memcpy(&p, positions, 4);
  memcpy(&q, positions + 3, 4);
  const __m256i shift = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
  const __m256 eight = _mm256_loadu_ps(x);
  const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(p)), shift);
  const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(q)), shift);
  return Lanes{{as_vec(join(_mm256_permutevar8x32_ps(eight, low), _mm256_permutevar8x32_ps(eight, high)))}};
}

}  // namespace

#include "amx.h"
#if defined(SPARSEC_SIMDE)
#define SPARSEC_DIGIT_PRIMITIVES "digits_portable.h"
#else
#define SPARSEC_DIGIT_PRIMITIVES "digits_avx512.h"
#endif
#include "table.h"

namespace sparsec {
namespace {
constexpr InstructionSet with_lines(const char* name) {
  InstructionSet found = instruction_set(name);
  found.panels = panels_of_lines;
#if !defined(SPARSEC_SIMDE)
  found.digits = avx2_digits;
  found.digitize = avx2_digitize;
  found.digit_rows = 2;
#endif
  return found;
}
constexpr InstructionSet with_words(const char* name) {
  InstructionSet found = with_lines(name);
  found.digits = digits;
  found.digitize = digitize;
  found.digit_rows = SPARSEC_DIGIT_ROWS;
  found.formats[kBitmap].one[kPlain][kBFloat16] = bitmap_one_words<BFloat16>;
  found.formats[kBitmap].one[kPlain][kFloat16] = bitmap_one_words<Float16>;
  found.panels = panels_of_words;
  return found;
}
constexpr InstructionSet with_pairs(const char* name, void (*amx)(const AmxTask&)) {
  InstructionSet found = with_words(name);
#if defined(SPARSEC_DOTS)
  // CPUs with matrix tiles are Intel's, where products of pairs are slower than multiply-adds (choice.h): 1.2 times in a loop like this.
  if (!amx) found.formats[kBitmap].one[kPlain][kBFloat16] = bitmap_one_dots;
  found.formats[kNm].one[kPlain][kBFloat16] = nm_one_pairs;
  found.pairs = pair_product;
  found.expand = expand_lines;
#endif
  found.amx = amx;
  return found;
}
}  // namespace
extern const InstructionSet kAvx512 = with_lines("avx512");
extern const InstructionSet kVbmi2 = with_words("vbmi2");
extern const InstructionSet kAvx512Bf16 = with_pairs("avx512_bf16", nullptr);
extern const InstructionSet kAmx = with_pairs("amx", kAmxProduct);
}
