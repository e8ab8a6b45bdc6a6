// CSR product for AVX2, FMA and F16C.
#include <immintrin.h>

#include "convert.h"

namespace {

inline __m128 load4(const float* v) { return _mm_loadu_ps(v); }
inline __m128 load4(const BFloat16* v) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(v));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
}
inline __m128 load4(const Float16* v) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v))); }

inline __m128 pick(const float* x, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  __m128 v = _mm_load_ss(x + a);
  v = _mm_insert_ps(v, _mm_load_ss(x + b), 0x10);
  v = _mm_insert_ps(v, _mm_load_ss(x + c), 0x20);
  return _mm_insert_ps(v, _mm_load_ss(x + d), 0x30);
}

// Four loads and three inserts instead of a gather: on Zen 3 0.30 ns per non-zero against 0.46 (0.39 for scalar loads). Four
// columns arrive in one 64-bit load.
inline __m128 pick4(const float* x, const uint16_t* columns) {
  uint64_t c;
  memcpy(&c, columns, 8);
  return pick(x, c & 0xffff, (c >> 16) & 0xffff, (c >> 32) & 0xffff, c >> 48);
}
inline __m128 pick4(const float* x, const int32_t* columns) {
  uint64_t c[2];
  memcpy(c, columns, 16);
  return pick(x, c[0] & 0xffffffff, c[0] >> 32, c[1] & 0xffffffff, c[1] >> 32);
}

// Far enough ahead to cover DRAM latency: 512 bytes of values; from memory 1.05-1.15 times as fast as without.
constexpr int64_t kAhead = 512;

template <class T, class I>
float dot(const T* values, const I* columns, const float* x, int64_t nnz) {
  __m128 a = _mm_setzero_ps(), b = a, c = a, d = a;
  int64_t at = 0;
  for (; at + 16 <= nnz; at += 16) {
    _mm_prefetch(reinterpret_cast<const char*>(values + at) + kAhead * sizeof(T), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(columns + at) + kAhead * sizeof(I), _MM_HINT_T0);
    a = _mm_fmadd_ps(load4(values + at), pick4(x, columns + at), a);
    b = _mm_fmadd_ps(load4(values + at + 4), pick4(x, columns + at + 4), b);
    c = _mm_fmadd_ps(load4(values + at + 8), pick4(x, columns + at + 8), c);
    d = _mm_fmadd_ps(load4(values + at + 12), pick4(x, columns + at + 12), d);
  }
  for (; at + 4 <= nnz; at += 4) a = _mm_fmadd_ps(load4(values + at), pick4(x, columns + at), a);
  a = _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  float sum = _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
  for (; at < nnz; ++at) sum += widen(values[at]) * x[columns[at]];
  return sum;
}

template <class T>
void widen8(const T* values, float* out) {
  _mm_storeu_ps(out, load4(values));
  _mm_storeu_ps(out + 4, load4(values + 4));
}

}  // namespace

#include "csr_rows.h"

namespace sparsec {
extern const InstructionSet kAvx2 = SPARSEC_TABLE("avx2");
}
