// bf16, more than one row of x, on a CPU with matrix tiles (AMX): a panel is decoded, some columns at a time, straight into the form that the
// tile product reads, and multiplied from there with all rows of x.
//
// A tile is 16 rows of 64 bytes. Of x: 16 tokens, 32 columns. Of W: 16 lines. As oneDNN's products of this type do, the instruction takes
// subnormal numbers for 0.
#pragma once
#include "pairs.h"

#if defined(SPARSEC_SIMDE)  // tiles of plain C++: slow, but the same loops
#define SPARSEC_AMX
#define SPARSEC_AMX_TARGET
#elif defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define SPARSEC_AMX
#define SPARSEC_AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512vbmi2")))
#endif
#endif

#if defined(SPARSEC_AMX)
namespace {

using sparsec::AmxTask;
using sparsec::kAmxColumns;
using sparsec::kAmxPairs;

#if defined(SPARSEC_SIMDE)
thread_local int64_t tile_rows = 16;
thread_local uint32_t tiles[8][16][16];
#define SPARSEC_TILE_ZERO(t) memset(tiles[t], 0, sizeof(tiles[t]))
#define SPARSEC_TILE_LOAD(t, from) memcpy(tiles[t], from, sizeof(tiles[t]))
#define SPARSEC_TILE_STORE(t, to) memcpy(to, tiles[t], 64 * tile_rows)
#define SPARSEC_TILE_DOT(c, a, b) tile_dot(tiles[c], tiles[a], tiles[b])
inline float upper_half(uint32_t pair) { return from_bits(pair & 0xffff0000u); }
inline void tile_dot(uint32_t (&c)[16][16], const uint32_t (&a)[16][16], const uint32_t (&b)[16][16]) {
  for (int64_t m = 0; m < tile_rows; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum = from_bits(c[m][n]);
      for (int k = 0; k < 16; ++k)
        sum += upper_half(a[m][k] << 16) * upper_half(b[k][n] << 16) + upper_half(a[m][k]) * upper_half(b[k][n]);
      c[m][n] = to_bits(sum);
    }
}
inline void use_tiles(int64_t rows) { tile_rows = rows; }
inline void release_tiles() {}
#else
#define SPARSEC_TILE_ZERO(t) _tile_zero(t)
#define SPARSEC_TILE_LOAD(t, from) _tile_loadd(t, from, 64)
#define SPARSEC_TILE_STORE(t, to) _tile_stored(t, to, 64)
#define SPARSEC_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
// Tiles of x and of sums have as many rows as there are tokens, those of W 16.
SPARSEC_AMX_TARGET inline void use_tiles(int64_t rows) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : 16);
  _tile_loadconfig(&config);
}
SPARSEC_AMX_TARGET inline void release_tiles() { _tile_release(); }
#endif

using Lines = PanelLines<kAmxColumns>;

// Two panels times two tiles of tokens, or one. sums: [2][16][16] of each of them, added to unless `fresh`. One tile of tokens has two sets of
// sums, for every other tile of columns, since a product waits four times as long for the one before it as it takes.
template <bool Two>
SPARSEC_AMX_TARGET inline void multiply_tiles(const Lines& w, int64_t k_tiles, const uint16_t* x, int64_t next_tile, float* sums, bool fresh) {
  if (fresh) {
    SPARSEC_TILE_ZERO(0);
    SPARSEC_TILE_ZERO(1);
    SPARSEC_TILE_ZERO(2);
    SPARSEC_TILE_ZERO(3);
  } else {
    SPARSEC_TILE_LOAD(0, sums);
    SPARSEC_TILE_LOAD(1, sums + 256);
    SPARSEC_TILE_LOAD(2, sums + 512);
    SPARSEC_TILE_LOAD(3, sums + 768);
  }
  const uint32_t used = w.used[0] | w.used[1];
  for (int64_t k = 0; k < k_tiles; ++k) {
    if (!(used >> k & 1)) continue;
    const uint16_t* const from = x + 512 * k;
    SPARSEC_TILE_LOAD(4, from);
    SPARSEC_TILE_LOAD(6, w.at + 256 * k);
    SPARSEC_TILE_LOAD(7, w.at + Lines::kOfPanel + 256 * k);
    if (Two) {
      SPARSEC_TILE_DOT(0, 4, 6);
      SPARSEC_TILE_LOAD(5, from + next_tile);
      SPARSEC_TILE_DOT(1, 4, 7);
      SPARSEC_TILE_DOT(2, 5, 6);
      SPARSEC_TILE_DOT(3, 5, 7);
    } else if (k % 2) {
      SPARSEC_TILE_DOT(2, 4, 6);
      SPARSEC_TILE_DOT(3, 4, 7);
    } else {
      SPARSEC_TILE_DOT(0, 4, 6);
      SPARSEC_TILE_DOT(1, 4, 7);
    }
  }
  SPARSEC_TILE_STORE(0, sums);
  SPARSEC_TILE_STORE(1, sums + 256);
  SPARSEC_TILE_STORE(2, sums + 512);
  SPARSEC_TILE_STORE(3, sums + 768);
}

// The first `count` of 16 sums in bf16, rounded as `narrow` does.
#if defined(SPARSEC_SIMDE)
inline void store_narrow(BFloat16* out, __m512 v, int64_t count) {
  float sums[16];
  _mm512_storeu_ps(sums, v);
  for (int64_t l = 0; l < count; ++l) narrow(sums[l], out + l);
}
#else
inline void store_narrow(BFloat16* out, __m512 v, int64_t count) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __m512i narrowed = _mm512_mask_blend_epi32(_mm512_cmpunord_ps_mask(v, v), up, quiet);
  _mm256_mask_storeu_epi16(out, static_cast<__mmask16>((1u << count) - 1), _mm512_cvtepi32_epi16(narrowed));
}
#endif

// Rows of out [tokens][out_stride] from the sums of one panel, or two: whole lines of a cache are written at a time.
inline void finish_pair(const AmxTask& t, int64_t panel, int64_t panels, const float* sums) {
  const int64_t row = 16 * panel, count = least(16 * least(2, panels), t.matrix->out_features - row);
  const BFloat16* const bias = static_cast<const BFloat16*>(t.matrix->bias);
  float add[32] = {};
  for (int64_t l = 0; bias && l < count; ++l) add[l] = widen(bias[row + l]);
  BFloat16* out = static_cast<BFloat16*>(t.out) + row;
  for (int64_t token = 0; token < t.tokens; ++token, out += t.out_stride) {
    const float* const from = sums + 1024 * (token / 32) + 512 * (token / 16 % 2) + 16 * (token % 16);
    const bool two_sets = t.token_tiles % 2 && token / 16 == t.token_tiles - 1;
    for (int h = 0; 16 * h < count; ++h) {
      __m512 sum = _mm512_loadu_ps(from + 256 * h);
      if (two_sets) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + 512 + 256 * h));
      if (bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(add + 16 * h));
      store_narrow(out + 16 * h, sum, least(16, count - 16 * h));
    }
  }
}

// Bitmap, one tile of tokens: here decoding takes longest, so that a tile of columns is multiplied while the next one is decoded.
SPARSEC_AMX_TARGET inline void bitmap_tile(const AmxTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const DecoderKind& kind = decoder_of(w);
  uint32_t* const lines = static_cast<uint32_t*>(t.scratch);  // [4][2][16][16]
  float* const sums = reinterpret_cast<float*>(lines + 2048);
  const int64_t k_tiles = (w.in_features + 31) / 32;
  for (int64_t first = t.first; first < t.last; first += 2) {
    const int64_t panels = least(2, t.last - first);
    AnyDecoder decoders[2];
    for (int64_t p = 0; p < panels; ++p) kind.start(decoders[p], w, first + p);
    SPARSEC_TILE_ZERO(0);
    SPARSEC_TILE_ZERO(1);
    for (int64_t k = 0; k <= k_tiles; ++k) {
      if (k < k_tiles)
        for (int64_t p = 0; p < panels; ++p)
          bitmap_lines(decoders[p], w, 32 * k, least(w.in_features, 32 * k + 32), lines + 512 * (k % 4) + 256 * p);
      if (k == 0) continue;
      const uint32_t* const at = lines + 512 * ((k - 1) % 4);
      SPARSEC_TILE_LOAD(4, t.x + 512 * (k - 1));
      SPARSEC_TILE_LOAD(6, at);
      SPARSEC_TILE_DOT(0, 4, 6);
      SPARSEC_TILE_LOAD(7, at + 256);
      SPARSEC_TILE_DOT(1, 4, 7);
    }
    SPARSEC_TILE_STORE(0, sums);
    SPARSEC_TILE_STORE(1, sums + 256);
    memset(sums + 512, 0, 2048);
    finish_pair(t, first, panels, sums);
  }
}

SPARSEC_AMX_TARGET void amx(const AmxTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const DecoderKind& kind = decoder_of(w);
  const int64_t in = w.in_features, per_pair = 1024 * ((t.token_tiles + 1) / 2), k_tiles = (in + 31) / 32;
  uint32_t* const lines = static_cast<uint32_t*>(t.scratch);
  float* const sums = reinterpret_cast<float*>(lines + 2 * Lines::kOfPanel);
  float* const decoded = sums + kAmxPairs * per_pair;
  // Where all of x stays in a second-level cache, pairs of panels go one by one.
  const int64_t group = t.token_tiles * k_tiles <= 1024 ? 2 : 2 * kAmxPairs;
  AnyDecoder decoders[2 * kAmxPairs];
  use_tiles(t.token_tiles == 1 ? t.tokens : 16);
  if (w.format == sparsec::kBitmap && t.token_tiles == 1) {
    bitmap_tile(t);
    return release_tiles();
  }
  for (int64_t first = t.first; first < t.last; first += group) {
    const int64_t panels = least(group, t.last - first);
    for (int64_t p = 0; p < panels; ++p) kind.start(decoders[p], w, first + p);
    for (int64_t begin = 0; begin < in; begin += kAmxColumns) {
      const int64_t end = least(in, begin + kAmxColumns);
      for (int64_t p = 0; p < panels; p += 2) {
        Lines pair{lines, {0, 0}};
        for (int64_t h = 0; h < least(2, panels - p); ++h) {
          pair.used[h] = lines_of(kind, decoders[p + h], w, begin, end, decoded, lines + h * Lines::kOfPanel);
        }
        const uint16_t* x = t.x + 16 * begin;
        float* own = sums + p / 2 * per_pair;
        const int64_t now = (end - begin + 31) / 32, tile = 512 * k_tiles;
        int64_t i = 0;
        for (; i + 2 <= t.token_tiles; i += 2) multiply_tiles<true>(pair, now, x + i * tile, tile, own + 512 * i, begin == 0);
        if (i < t.token_tiles) multiply_tiles<false>(pair, now, x + i * tile, tile, own + 512 * i, begin == 0);
      }
    }
    for (int64_t p = 0; p < panels; p += 2) finish_pair(t, first + p, panels - p, sums + p / 2 * per_pair);
  }
  release_tiles();
}
constexpr void (*kAmxProduct)(const AmxTask&) = amx;

}  // namespace
#else
namespace {
constexpr void (*kAmxProduct)(const sparsec::AmxTask&) = nullptr;  // a compiler that does not know them
}
#endif
