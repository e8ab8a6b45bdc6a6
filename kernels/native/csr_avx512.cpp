// CSR product for AVX-512 F, BW, DQ, VL with FMA and F16C.
//
// Written with the intrinsics that SIMDe emulates, so that the tests can run this very file on a CPU without AVX-512
// (-DSPARSEC_SIMDE): gathers are therefore two of eight lanes, which cost the same as one of sixteen.
#if defined(SPARSEC_SIMDE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#endif
#include <immintrin.h>

#include "convert.h"

namespace {

inline __m256 load8(const float* v) { return _mm256_loadu_ps(v); }
inline __m256 load8(const BFloat16* v) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(v));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline __m256 load8(const Float16* v) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v))); }

inline __m256 pick8(const float* x, const uint16_t* columns) {
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns));
  return _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(c), 4);
}
inline __m256 pick8(const float* x, const int32_t* columns) {
  return _mm256_i32gather_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)), 4);
}

inline __m512 join(__m256 low, __m256 high) { return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1); }

template <class T>
inline __m512 load16(const T* v) {
  return join(load8(v), load8(v + 8));
}
template <class I>
inline __m512 pick16(const float* x, const I* columns) {
  return join(pick8(x, columns), pick8(x, columns + 8));
}

constexpr int64_t kAhead = 512;

template <class T, class I>
float dot(const T* values, const I* columns, const float* x, int64_t nnz) {
  __m512 a = _mm512_setzero_ps(), b = a;
  int64_t at = 0;
  for (; at + 32 <= nnz; at += 32) {
    _mm_prefetch(reinterpret_cast<const char*>(values + at) + kAhead * sizeof(T), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(columns + at) + kAhead * sizeof(I), _MM_HINT_T0);
    a = _mm512_fmadd_ps(load16(values + at), pick16(x, columns + at), a);
    b = _mm512_fmadd_ps(load16(values + at + 16), pick16(x, columns + at + 16), b);
  }
  a = _mm512_add_ps(a, b);
  __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
  for (; at + 8 <= nnz; at += 8) s = _mm256_fmadd_ps(load8(values + at), pick8(x, columns + at), s);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  float sum = _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  for (; at < nnz; ++at) sum += widen(values[at]) * x[columns[at]];
  return sum;
}

template <class T>
void widen8(const T* values, float* out) {
  _mm256_storeu_ps(out, load8(values));
}

}  // namespace

#include "csr_rows.h"

namespace sparsec {
extern const InstructionSet kAvx512 = SPARSEC_TABLE("avx512");
}
