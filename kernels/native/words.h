// Bitmaps whose values have 16 bits, on CPUs that expand such values (AVX-512 VBMI2).
#pragma once
#include "lines.h"

namespace {

// Sixteen sums of bf16: both columns of a lane to one; of fp16: those of lanes 0 to 7 side by side, then of lanes 8 to 15.
template <class V>
struct WideSums {
  __m512 sums[2];
};
SPARSEC_VBMI2 inline void add_words(WideSums<BFloat16>& to, __m512i lanes, const float* x) {
  to.sums[0] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(lanes, 16)), _mm512_set1_ps(x[0]), to.sums[0]);
  const __m512i second = _mm512_and_si512(lanes, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  to.sums[1] = _mm512_fmadd_ps(_mm512_castsi512_ps(second), _mm512_set1_ps(x[1]), to.sums[1]);
}
SPARSEC_VBMI2 inline Lanes total(const WideSums<BFloat16>& of) { return Lanes{{as_vec(_mm512_add_ps(of.sums[0], of.sums[1]))}}; }
SPARSEC_VBMI2 inline void add_words(WideSums<Float16>& to, __m512i lanes, const float* x) {
  Float16 words[32];  // stays in a register
  memcpy(words, &lanes, sizeof(words));
  const __m512 pair = _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const Unaligned*>(x)));
  for (int i = 0; i < 2; ++i) to.sums[i] = _mm512_fmadd_ps(values16(words + 16 * i), pair, to.sums[i]);
}
SPARSEC_VBMI2 inline Lanes total(const WideSums<Float16>& of) {
  Lanes columns[2];
  const Vec eights[2] = {as_vec(of.sums[0]), as_vec(of.sums[1])};
  apart(eights, columns);
  return add(columns[0], columns[1]);
}

template <class V>
SPARSEC_VBMI2 void bitmap_one_words(const sparsec::Task& t) {
  const sparsec::Matrix& w = *t.matrix;
  const float* x = static_cast<const float*>(t.x);
  const int64_t steps = steps_of<V>(w), whole = w.in_features / 2;
  const uint32_t* bits = static_cast<const uint32_t*>(w.columns) + t.first * steps;
  StepReader reader(w, static_cast<const V*>(w.values) + w.start[t.first]);
  const float last[2] = {w.in_features ? x[w.in_features - 1] : 0.0f, 0.0f};  // of a lane that is not full
  for (int64_t p = t.first; p < t.last; ++p, bits += steps) {
    WideSums<V> a = {}, b = {};
    int64_t k = 0;
    for (; k + 2 <= whole; k += 2) {
      __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kWordsAhead);
      add_words(a, reader.take(bits[k]), x + 2 * k);
      add_words(b, reader.take(bits[k + 1]), x + 2 * k + 2);
    }
    for (; k < steps; ++k) add_words(a, reader.take(bits[k]), k < whole ? x + 2 * k : last);
    finish(add(total(a), total(b)), static_cast<const V*>(w.bias), 16 * p, least(16, w.out_features - 16 * p), static_cast<V*>(t.out));
  }
}

template <class V>
struct WordDecoder : BitmapDecoder<V> {
  using BitmapDecoder<V>::values;
  using BitmapDecoder<V>::bits;

  WordDecoder() = default;
  WordDecoder(const sparsec::Matrix& w, int64_t panel) : BitmapDecoder<V>(w, panel), last(StepReader(w, values).last) {}

  StepReader reader() const {
    StepReader from;
    from.next = reinterpret_cast<const uint16_t*>(values);
    from.last = last;
    return from;
  }

  SPARSEC_VBMI2 int64_t decode(const sparsec::Matrix&, int64_t begin, int64_t end, float* to, int32_t*, const float**) {
    StepReader from = reader();
    for (int64_t k = begin; k < end; k += 2, to += 32) {
      if (k % 4 == 0) __builtin_prefetch(reinterpret_cast<const char*>(bits + k / 2) + kWordsAhead);
      Lanes columns[2];
      columns_of(from.take(bits[k / 2]), values, columns);
      store_lanes(to, columns[0]);
      if (k + 1 < end) store_lanes(to + 16, columns[1]);
    }
    values = reinterpret_cast<const V*>(from.next);
    return 1;
  }

  // As BitmapDecoder's. Of few rows each has two sums, since one alone would be waited for.
  template <int M>
  SPARSEC_VBMI2 void multiply(int64_t begin, int64_t end, const float* x, float* acc, int64_t, int64_t) {
    constexpr int kSums = M <= 6 ? 2 : 1;
    StepReader from = reader();
    Lanes sums[kSums][M] = {}, columns[2];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[0][m] = load_lanes(acc + 16 * m);
    x += begin * M;
    int64_t k = begin / 2;
    for (; k < end / 2; ++k, x += 2 * M) {
      __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kWordsAhead);
      columns_of(from.take(bits[k]), values, columns);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) add_product(sums[0][m], columns[0], x[m]);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) add_product(sums[kSums - 1][m], columns[1], x[M + m]);
    }
    if (end % 2) {  // a lane that is not full
      columns_of(from.take(bits[k]), values, columns);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) add_product(sums[0][m], columns[0], x[m]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) store_lanes(acc + 16 * m, kSums == 2 ? add(sums[0][m], sums[kSums - 1][m]) : sums[0][m]);
    values = reinterpret_cast<const V*>(from.next);
  }

 private:
  const uint16_t* last;  // of StepReader
};

const DecoderKind kWordDecoders[] = {{}, decoder_kind<WordDecoder<BFloat16>>(), decoder_kind<WordDecoder<Float16>>()};  // by type

inline const DecoderKind& words_of(const sparsec::Matrix& w) {
  return w.format == sparsec::kBitmap && w.lane == 2 ? kWordDecoders[w.type] : turned_of(w);
}
void panels_of_words(const sparsec::PanelTask& t) { panels_by<words_of>(t); }

}  // namespace
