// Lines: columns of a bf16 panel in registers that multiply pairs of numbers. A line is a step of two columns, 16 lanes of 32 bits; matrix
// tiles and dot products of pairs read it as it is. Also how a CPU that expands 16-bit numbers (AVX-512 VBMI2) reads a bitmap.
#pragma once
#include "panels.h"

#if defined(SPARSEC_SIMDE)
#define SPARSEC_VBMI2
#else
#define SPARSEC_VBMI2 __attribute__((target("avx512vbmi2")))
#endif

namespace {

inline __m512i load_bits(const void* from) { return _mm512_loadu_si512(from); }

#if defined(SPARSEC_SIMDE)  // which has neither
inline __m512i load_some(const uint16_t* from, int count) {
  uint16_t words[32] = {};
  memcpy(words, from, 2 * count);
  return load_bits(words);
}
inline __m512i expand_words(uint32_t bits, __m512i v) {
  uint16_t from[32], to[32];
  memcpy(from, &v, 64);
  for (int i = 0, next = 0; i < 32; ++i) to[i] = (bits >> i) & 1 ? from[next++] : 0;
  return load_bits(to);
}
#else
SPARSEC_VBMI2 inline __m512i load_some(const uint16_t* from, int count) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), from);
}
// In registers, after a load: the form that reads memory is slow on some CPUs, and GCC would choose it.
SPARSEC_VBMI2 inline __m512i expand_words(uint32_t bits, __m512i v) {
  asm("" : "+v"(v));
  return _mm512_maskz_expand_epi16(bits, v);
}
#endif

// Both columns of a line.
template <class V>
inline void columns_of(__m512i line, const V*, Lanes (&columns)[2]) {
  V numbers[32];  // stays in registers
  memcpy(static_cast<void*>(numbers), &line, sizeof(numbers));
  load_step(numbers, columns);
}

// Sixteen lines become sixteen rows of 32 columns, and the other way round; `stride` numbers apart.
inline void turn(const uint16_t* from, int64_t stride, __m512i (&to)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512i line = load_bits(from + stride * i), next = load_bits(from + stride * (i + 1));
    a[i] = _mm512_unpacklo_epi32(line, next);
    a[i + 1] = _mm512_unpackhi_epi32(line, next);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88), odd2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    to[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    to[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    to[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    to[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
}

// Dense rows of 16 bits.
template <class V>
struct TurnedDecoder : DenseDecoder<V> {
  using DenseDecoder<V>::DenseDecoder;

  int64_t decode(const sparsec::Matrix& w, int64_t begin, int64_t end, float* to, int32_t* starts, const float** in_place) {
    int64_t k = begin;
    for (; this->count == 16 && k + 32 <= end; k += 32) {
      __m512i lines[16];
      turn(reinterpret_cast<const uint16_t*>(this->rows) + k, w.in_features, lines);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i, to += 32) {
        Lanes columns[2];
        columns_of(lines[i], this->rows, columns);
        store_lanes(to, columns[0]);
        store_lanes(to + 16, columns[1]);
      }
    }
    return DenseDecoder<V>::decode(w, k, end, to, starts, in_place);
  }
};
const DecoderKind kTurnedDecoders[] = {{}, decoder_kind<TurnedDecoder<BFloat16>>(), decoder_kind<TurnedDecoder<Float16>>()};  // by type

inline const DecoderKind& turned_of(const sparsec::Matrix& w) {
  return w.format == sparsec::kDense && w.lane == 2 ? kTurnedDecoders[w.type] : decoder_of(w);
}
void panels_of_lines(const sparsec::PanelTask& t) { panels_by<turned_of>(t); }

// Of bits and of values, each. On a Xeon (Emerald Rapids) 2048 were 1.07 times as slow.
constexpr int64_t kWordsAhead = 4096;  // bytes

// The steps of a bitmap of 16-bit numbers. Whole loads stay inside the values; of the last of them a part is read.
struct StepReader {
  const uint16_t* next;
  const uint16_t* last;  // that 32 values may be read from

  StepReader() = default;
  StepReader(const sparsec::Matrix& w, const void* values)
      : next(static_cast<const uint16_t*>(values)), last(static_cast<const uint16_t*>(w.values) + w.stored - 32) {}

  SPARSEC_VBMI2 inline __m512i take(uint32_t bits) {
#if !defined(SPARSEC_SIMDE)
    asm("" : "+r"(bits));  // in a general register: GCC would load a mask register and move it back to count
#endif
    const int count = __builtin_popcount(bits);
    const __m512i values = __builtin_expect(next <= last, 1) ? load_bits(next) : load_some(next, count);
    __builtin_prefetch(reinterpret_cast<const char*>(next) + kWordsAhead);
    next += count;
    return expand_words(bits, values);
  }
};

// Two panels, some columns of them.
template <int64_t Columns>
struct PanelLines {
  static constexpr int64_t kOfPanel = Columns / 2 * 16;
  uint32_t* at;      // [2][Columns / 2][16]
  uint32_t used[2];  // by panel, a bit for each 32 columns in which anything is
};

SPARSEC_VBMI2 inline uint32_t bitmap_lines(AnyDecoder& any, const sparsec::Matrix& w, int64_t begin, int64_t end, uint32_t* to) {
  BitmapDecoder<BFloat16> decoder;
  memcpy(static_cast<void*>(&decoder), any.state, sizeof(decoder));
  StepReader reader(w, decoder.values);
  const uint32_t* const bits = decoder.bits;
  int64_t k = begin / 2;
  for (; k < (end + 1) / 2; ++k, to += 16) {
    if (k % 2 == 0) __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kWordsAhead);
    _mm512_storeu_si512(to, reader.take(bits[k]));
  }
  for (; (k - begin / 2) % 16; ++k, to += 16) _mm512_storeu_si512(to, _mm512_setzero_si512());
  decoder.values = reinterpret_cast<const BFloat16*>(reader.next);
  memcpy(any.state, &decoder, sizeof(decoder));
  return ~0u;
}

// Blocks that hold lines.
inline bool has_lines(const sparsec::Matrix& w) { return w.format == sparsec::kBsr && w.lane == 2 && w.r % 16 == 0; }
inline uint32_t bsr_lines(AnyDecoder& any, const sparsec::Matrix& w, int64_t begin, int64_t end, uint32_t* to) {
  BsrDecoder<BFloat16> decoder;
  memcpy(static_cast<void*>(&decoder), any.state, sizeof(decoder));
  memset(to, 0, 1024 * ((end - begin + 31) / 32));
  uint32_t used = 0;
  auto& half = decoder.halves[0];
  for (int64_t column; half.at < half.end && (column = block_column(w, half.at) * w.c) < end; ++half.at) {
    const uint32_t* from = static_cast<const uint32_t*>(w.values) + half.at * (w.c / 2) * w.r + half.lane;
    for (int64_t k = column - begin; k < column - begin + w.c; k += 2, from += w.r) {
      _mm512_storeu_si512(to + 8 * k, load_bits(from));
      used |= 1u << (k / 32);
    }
  }
  memcpy(any.state, &decoder, sizeof(decoder));
  return used;
}

// Any format: decoded to fp32 lanes, of which the upper halves are what was stored.
inline uint32_t any_lines(const DecoderKind& kind, AnyDecoder& decoder, const sparsec::Matrix& w, int64_t begin, int64_t end, float* decoded,
                          uint32_t* to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const int64_t blocks = block_columns(w);
  int32_t* const starts = reinterpret_cast<int32_t*>(decoded + 16 * (kDecodedColumns + blocks));
  const int64_t tiles = (end - begin + 31) / 32;
  if (blocks || (end - begin) % 32) memset(to, 0, 1024 * tiles);
  uint32_t used = blocks ? 0 : ~0u;
  for (int64_t b = begin; b < end; b += kDecodedColumns) {
    const int64_t e = least(end, b + kDecodedColumns);
    const float* columns = decoded;
    starts[0] = static_cast<int32_t>(b);
    const int64_t runs = kind.decode(decoder, w, b, e, decoded, starts, &columns);
    if (!blocks) {
      for (int64_t k = b; k < e; k += 2, columns += 32) {
        const __m512i first = _mm512_srli_epi32(load_bits(columns), 16);
        const __m512i second = k + 1 < e ? _mm512_and_si512(load_bits(columns + 16), upper) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + 8 * (k - begin), _mm512_or_si512(first, second));
      }
      continue;
    }
    for (int64_t i = 0; i < runs; ++i)
      for (int64_t k = starts[i] - begin; k < starts[i] - begin + blocks; ++k, columns += 16) {
        uint32_t* const line = to + 16 * (k / 2);
        const __m512i own = k % 2 ? _mm512_and_si512(load_bits(columns), upper) : _mm512_srli_epi32(load_bits(columns), 16);
        _mm512_storeu_si512(line, _mm512_or_si512(load_bits(line), own));
        used |= 1u << (k / 32);
      }
  }
  return used;
}

// Columns [begin, end) of a panel; gives the bits of PanelLines::used.
inline uint32_t lines_of(const DecoderKind& kind, AnyDecoder& decoder, const sparsec::Matrix& w, int64_t begin, int64_t end, float* decoded,
                         uint32_t* to) {
  if (w.format == sparsec::kBitmap) return bitmap_lines(decoder, w, begin, end, to);
  if (has_lines(w)) return bsr_lines(decoder, w, begin, end, to);
  return any_lines(kind, decoder, w, begin, end, decoded, to);
}

}  // namespace
