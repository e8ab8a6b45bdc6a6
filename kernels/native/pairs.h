// Products of bf16 whose lanes are multiplied as they are, both columns at once, on CPUs that have an instruction for it (AVX-512 BF16).
// It reads subnormal numbers as 0.
#pragma once
#include "words.h"

#if defined(SPARSEC_SIMDE)
#define SPARSEC_DOTS
#define SPARSEC_BF16
#elif defined(__has_include)
#if __has_include(<avx512bf16intrin.h>)
#define SPARSEC_DOTS
#define SPARSEC_BF16 __attribute__((target("avx512vbmi2,avx512bf16")))
#endif
#endif

namespace {

#if defined(SPARSEC_DOTS)

#if defined(SPARSEC_SIMDE)
inline __m512 add_dots(__m512 sums, __m512i a, __m512i b) {
  float s[16];
  uint32_t u[16], v[16];
  memcpy(s, &sums, 64);
  memcpy(u, &a, 64);
  memcpy(v, &b, 64);
  const auto number = [](uint32_t upper) { return upper & 0x7f800000u ? from_bits(upper & 0xffff0000u) : from_bits(upper & 0x80000000u); };
  for (int l = 0; l < 16; ++l) s[l] += number(u[l]) * number(v[l]) + number(u[l] << 16) * number(v[l] << 16);
  return _mm512_loadu_ps(s);
}
#else
SPARSEC_BF16 inline __m512 add_dots(__m512 sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
#endif

SPARSEC_BF16 void bitmap_one_dots(const sparsec::Task& t) {
  const sparsec::Matrix& w = *t.matrix;
  const int64_t steps = steps_of<BFloat16>(w);
  const uint32_t* const x = t.pairs;
  const uint32_t* bits = static_cast<const uint32_t*>(w.columns) + t.first * steps;
  StepReader reader(w, static_cast<const BFloat16*>(w.values) + w.start[t.first]);
  const auto pair = [&](int64_t k) { return _mm512_set1_epi32(static_cast<int>(x[k])); };
  for (int64_t p = t.first; p < t.last; ++p, bits += steps) {
    __m512 a = _mm512_setzero_ps(), b = a;
    int64_t k = 0;
    for (; k + 2 <= steps; k += 2) {
      __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kWordsAhead);
      a = add_dots(a, reader.take(bits[k]), pair(k));
      b = add_dots(b, reader.take(bits[k + 1]), pair(k + 1));
    }
    if (k < steps) a = add_dots(a, reader.take(bits[k]), pair(k));
    finish(Lanes{{as_vec(_mm512_add_ps(a, b))}}, static_cast<const BFloat16*>(w.bias), 16 * p, least(16, w.out_features - 16 * p),
           static_cast<BFloat16*>(t.out));
  }
}

// N:M of which a step lies in one group: the positions of both slots choose among copies of the group's numbers of x.
template <int M>
SPARSEC_BF16 void nm_one_dots(const sparsec::Task& t) {
  constexpr int B = M == 4 ? 2 : 3;  // bits of a position
  const sparsec::Matrix& w = *t.matrix;
  const int64_t n = w.r, groups = w.in_features / M;
  const uint16_t* const x = reinterpret_cast<const uint16_t*>(t.pairs);
  const char* values = static_cast<const char*>(w.values) + t.first * groups * n * 32;
  const uint8_t* positions = static_cast<const uint8_t*>(w.columns) + t.first * groups * n * 2 * B;
  LaneBits shifts;
  for (int l = 0; l < 16; ++l) shifts[l] = static_cast<uint32_t>(l % (M == 4 ? 16 : 8) * B);
  const auto slot = [&](const uint8_t* from) {
    uint32_t low, high;
    memcpy(&low, from, 4);
    memcpy(&high, from + (M == 4 ? 0 : 3), 4);
    LaneBits both;
    if (M == 4) {
      both = low - LaneBits{};
    } else {
      const __m512i eights = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(static_cast<int>(low))),
                                                _mm256_set1_epi32(static_cast<int>(high)), 1);
      memcpy(&both, &eights, sizeof(both));
    }
    return both >> shifts;
  };
  for (int64_t p = t.first; p < t.last; ++p) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t chain = 0;
    for (int64_t g = 0; g < groups; ++g) {
      __m128i group = _mm_setzero_si128();
      memcpy(&group, x + g * M, 2 * M);
      const __m512i copies = M == 4 ? _mm512_broadcastq_epi64(group) : _mm512_broadcast_i32x4(group);
      for (int64_t s = 0; s < n; s += 2, values += 64, positions += 4 * B, chain ^= 1) {
        __builtin_prefetch(values + kSlotAhead);
        const LaneBits chosen = (slot(positions) & 0xffffu) | slot(positions + 2 * B) << 16;
        __m512i at;
        memcpy(&at, &chosen, sizeof(at));
        sums[chain] = add_dots(sums[chain], load_bits(values), _mm512_permutexvar_epi16(at, copies));
      }
    }
    finish(Lanes{{as_vec(_mm512_add_ps(sums[0], sums[1]))}}, static_cast<const BFloat16*>(w.bias), 16 * p,
           least(16, w.out_features - 16 * p), static_cast<BFloat16*>(t.out));
  }
}
void nm_one_pairs(const sparsec::Task& t) {
  if (t.matrix->r % 2) return nm_rows<BFloat16, BFloat16>(t);
  t.matrix->c == 4 ? nm_one_dots<4>(t) : nm_one_dots<8>(t);
}

using sparsec::kPairColumns;
using sparsec::PairTask;

// acc [M][16] += a panel times M rows of x, straight from the bitmap.
template <int M>
SPARSEC_BF16 void bitmap_dots(const sparsec::Matrix& w, int64_t panel, const uint32_t* x, float* acc) {
  const int64_t steps = steps_of<BFloat16>(w);
  const uint32_t* const bits = static_cast<const uint32_t*>(w.columns) + panel * steps;
  StepReader reader(w, static_cast<const BFloat16*>(w.values) + w.start[panel]);
  __m512 sums[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < steps; ++k, x += M) {
    if (k % 2 == 0) __builtin_prefetch(reinterpret_cast<const char*>(bits + k) + kWordsAhead);
    const __m512i lanes = reader.take(bits[k]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[m] = add_dots(sums[m], lanes, _mm512_set1_epi32(static_cast<int>(x[m])));
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) _mm512_storeu_ps(acc + 16 * m, sums[m]);
}

// Lines of two panels, from a cache, times M rows of x.
template <int M>
SPARSEC_BF16 void line_dots(const uint32_t* w, const uint32_t* w2, const uint32_t* x, int64_t lines, float* acc, float* acc2) {
  __m512 sums[M], sums2[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    sums[m] = _mm512_loadu_ps(acc + 16 * m);
    sums2[m] = _mm512_loadu_ps(acc2 + 16 * m);
  }
  for (int64_t k = 0; k < lines; ++k, w += 16, w2 += 16, x += M) {
    const __m512i line = load_bits(w), line2 = load_bits(w2);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(x[m]));
      sums[m] = add_dots(sums[m], line, pair);
      sums2[m] = add_dots(sums2[m], line2, pair);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(acc + 16 * m, sums[m]);
    _mm512_storeu_ps(acc2 + 16 * m, sums2[m]);
  }
}
const decltype(&bitmap_dots<1>) kBitmapDots[] = {bitmap_dots<1>, bitmap_dots<2>, bitmap_dots<3>,  bitmap_dots<4>,
                                                 bitmap_dots<5>, bitmap_dots<6>, bitmap_dots<7>,  bitmap_dots<8>,
                                                 bitmap_dots<9>, bitmap_dots<10>, bitmap_dots<11>, bitmap_dots<12>};
const decltype(&line_dots<1>) kLineDots[] = {line_dots<1>, line_dots<2>, line_dots<3>, line_dots<4>,  line_dots<5>,  line_dots<6>,
                                             line_dots<7>, line_dots<8>, line_dots<9>, line_dots<10>, line_dots<11>, line_dots<12>};

void pair_product(const PairTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const DecoderKind& kind = decoder_of(w);
  const int64_t in = w.in_features, rows = t.rows_per_tile, steps = (in + 1) / 2, per_panel = 16 * rows * t.tiles;
  const bool direct = w.format == sparsec::kBitmap && t.tiles == 1;
  PanelLines<kPairColumns> pair{reinterpret_cast<uint32_t*>(t.scratch), {0, 0}};
  float* const sums = t.scratch + 2 * pair.kOfPanel;
  float* const decoded = sums + kPanelGroup * per_panel;
  // Where all of x stays in a second-level cache, pairs of panels go one by one.
  const int64_t group = steps * rows * t.tiles <= kCachedFloats ? 2 : kPanelGroup;
  AnyDecoder decoders[kPanelGroup];
  for (int64_t first = t.first; first < t.last; first += group) {
    const int64_t panels = least(group, t.last - first);
    if (direct) {
      for (int64_t p = 0; p < panels; ++p) kBitmapDots[rows - 1](w, first + p, t.x, sums + p * per_panel);
      finish_panels<BFloat16>(t, sums, per_panel, first, panels);
      continue;
    }
    for (int64_t p = 0; p < panels; ++p) kind.start(decoders[p], w, first + p);
    memset(sums, 0, sizeof(float) * per_panel * ((panels + 1) / 2 * 2));
    for (int64_t begin = 0; begin < in; begin += kPairColumns) {
      const int64_t end = least(in, begin + kPairColumns), lines = (end - begin + 1) / 2;
      for (int64_t p = 0; p < panels; p += 2) {
        uint32_t used = 0;
        for (int64_t h = 0; h < 2; ++h) {
          uint32_t* const to = pair.at + h * pair.kOfPanel;
          if (p + h < panels)
            used |= lines_of(kind, decoders[p + h], w, begin, end, decoded, to);
          else
            memset(to, 0, 64 * lines);
        }
        if (!used) continue;
        float* const own = sums + p * per_panel;
        for (int64_t i = 0; i < t.tiles; ++i)
          kLineDots[rows - 1](pair.at, pair.at + pair.kOfPanel, t.x + (i * steps + begin / 2) * rows, lines, own + i * 16 * rows,
                              own + per_panel + i * 16 * rows);
      }
    }
    finish_panels<BFloat16>(t, sums, per_panel, first, panels);
  }
}

// bf16: row by row again, without a way through fp32.
void expand_lines(const sparsec::ExpandTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  if (w.type != sparsec::kBFloat16 || !holds_blocks(w, kPairColumns)) return expand(t);
  const DecoderKind& kind = decoder_of(w);
  const int64_t in = w.in_features;
  uint32_t lines[kPairColumns / 2 * 16];
  AnyDecoder decoder;
  for (int64_t p = t.first; p < t.last; ++p) {
    kind.start(decoder, w, p);
    uint16_t* const out = static_cast<uint16_t*>(t.out) + 16 * (p - t.first) * in;
    const int64_t count = least(16, w.out_features - 16 * p);
    for (int64_t begin = 0; begin < in; begin += kPairColumns) {
      const int64_t end = least(in, begin + kPairColumns);
      lines_of(kind, decoder, w, begin, end, t.scratch, lines);
      for (int64_t k = begin; k < end; k += 32) {
        __m512i rows[16];
        turn(reinterpret_cast<const uint16_t*>(lines + 8 * (k - begin)), 32, rows);
        const size_t bytes = 2 * static_cast<size_t>(least(32, end - k));
        for (int64_t l = 0; l < count; ++l)
          if (bytes == 64)
            _mm512_storeu_si512(out + l * in + k, rows[l]);
          else
            memcpy(out + l * in + k, &rows[l], bytes);
      }
    }
  }
}

#endif

}  // namespace
