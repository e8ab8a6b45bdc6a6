// Many rows of x: a panel of W is decoded, some columns at a time, into a cache, and multiplied from there with every row of x.
//
// A decoder knows one panel of one format:
//   Decoder(const Matrix&, int64_t panel)
//   int64_t decode(const Matrix&, int64_t begin, int64_t end, float* to, int32_t* starts, const float** in_place)
// writes columns [begin, end), 16 lanes each, to `to` and returns 1; BSR writes the columns of the blocks that begin there, tells
// in `starts` which those are, and returns the number of blocks; where the values can be read as they are it sets `in_place`.
//   void multiply<M>(begin, end, x, acc, ahead, turn)   where kDirect: columns times M rows of x, without a cache between (bitmap.h)
#pragma once
#include "bitmap.h"
#include "bsr.h"
#include "csr.h"
#include "dense.h"
#include "nm.h"

namespace {

using sparsec::kDecodedColumns;
using sparsec::kPanelGroup;

// acc [M][16] += x [in][M] of the decoded columns.
template <int M>
void tile(const float* w, const float* x, const int32_t* starts, int64_t runs, int64_t run, float* acc) {
  Lanes sums[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sums[m] = load_lanes(acc + 16 * m);
  for (int64_t i = 0; i < runs; ++i) {
    const float* from = x + static_cast<int64_t>(starts[i]) * M;
    for (int64_t k = 0; k < run; ++k, w += 16, from += M) {
      const Lanes column = load_lanes(w);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) add_product(sums[m], column, from[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store_lanes(acc + 16 * m, sums[m]);
}

#if defined(__AVX512F__) || defined(SPARSEC_SIMDE)
#define SPARSEC_PANEL_PAIRS
// Two panels at once, of `run` columns: with one alone, loading x takes as long as multiplying.
template <int M>
void tile_pair(const float* w, const float* w2, const float* x, int64_t run, float* acc, float* acc2) {
  Lanes sums[M], sums2[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    sums[m] = load_lanes(acc + 16 * m);
    sums2[m] = load_lanes(acc2 + 16 * m);
  }
  for (int64_t k = 0; k < run; ++k, w += 16, w2 += 16, x += M) {
    const Lanes column = load_lanes(w), column2 = load_lanes(w2);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      add_product(sums[m], column, x[m]);
      add_product(sums2[m], column2, x[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store_lanes(acc + 16 * m, sums[m]);
    store_lanes(acc2 + 16 * m, sums2[m]);
  }
}
using TilePair = void (*)(const float* w, const float* w2, const float* x, int64_t run, float* acc, float* acc2);
const TilePair kTilePairs[] = {tile_pair<1>, tile_pair<2>, tile_pair<3>, tile_pair<4>,  tile_pair<5>,  tile_pair<6>,
                               tile_pair<7>, tile_pair<8>, tile_pair<9>, tile_pair<10>, tile_pair<11>, tile_pair<12>};
constexpr int64_t kPanelsAtOnce = 2;
#else
constexpr int64_t kPanelsAtOnce = 1;
#endif

// One panel that is being decoded, of whatever format and type. Decoding is called once for hundreds of columns, so that it can go through a
// pointer, and the loops around it need not be compiled for every format, type and number of rows.
struct AnyDecoder {
  alignas(8) unsigned char state[(16 * 3 + 1) * 8];
};
using Direct = void (*)(AnyDecoder&, int64_t begin, int64_t end, const float* x, float* acc, int64_t ahead, int64_t turn);
struct DecoderKind {
  void (*start)(AnyDecoder&, const sparsec::Matrix&, int64_t panel);
  int64_t (*decode)(AnyDecoder&, const sparsec::Matrix&, int64_t begin, int64_t end, float* to, int32_t* starts,
                    const float** in_place);
  const Direct* direct;  // by rows of x less one; null where there is none
};
template <class Decoder>
void start_decoder(AnyDecoder& any, const sparsec::Matrix& w, int64_t panel) {
  static_assert(sizeof(Decoder) <= sizeof(any.state), "");
  const Decoder decoder(w, panel);
  memcpy(any.state, &decoder, sizeof(decoder));
}
template <class Decoder>
int64_t decode_any(AnyDecoder& any, const sparsec::Matrix& w, int64_t begin, int64_t end, float* to, int32_t* starts,
                   const float** in_place) {
  Decoder decoder;
  memcpy(static_cast<void*>(&decoder), any.state, sizeof(decoder));
  const int64_t runs = decoder.decode(w, begin, end, to, starts, in_place);
  memcpy(any.state, &decoder, sizeof(decoder));
  return runs;
}
template <class Decoder, int M>
void multiply_direct(AnyDecoder& any, int64_t begin, int64_t end, const float* x, float* acc, int64_t ahead, int64_t turn) {
  Decoder decoder;
  memcpy(static_cast<void*>(&decoder), any.state, sizeof(decoder));
  decoder.template multiply<M>(begin, end, x, acc, ahead, turn);
  memcpy(any.state, &decoder, sizeof(decoder));
}
template <class Decoder>
const Direct kDirectByRows[] = {
    multiply_direct<Decoder, 1>,  multiply_direct<Decoder, 2>,
#if defined(__AVX2__) || defined(__aarch64__)
    multiply_direct<Decoder, 3>,  multiply_direct<Decoder, 4>,
#endif
#if defined(__AVX2__)
    multiply_direct<Decoder, 5>,  multiply_direct<Decoder, 6>,
#endif
#if defined(__AVX512F__) || defined(SPARSEC_SIMDE)
    multiply_direct<Decoder, 7>,  multiply_direct<Decoder, 8>,  multiply_direct<Decoder, 9>,
    multiply_direct<Decoder, 10>, multiply_direct<Decoder, 11>, multiply_direct<Decoder, 12>,
#endif
};
constexpr int64_t kDirectTiles = 2;
constexpr int64_t kDirectColumns = 256;  // read twice, the second time out of a cache
constexpr int64_t kDirectAhead = 12288;  // bytes: past the columns that are read twice

template <class Decoder>
constexpr DecoderKind decoder_kind() {
  DecoderKind kind{start_decoder<Decoder>, decode_any<Decoder>, nullptr};
  if constexpr (Decoder::kDirect) kind.direct = kDirectByRows<Decoder>;
  return kind;
}
struct DecoderKinds {
  DecoderKind kinds[sparsec::kCodecs][sparsec::kFloat64];
};
template <class F>
constexpr DecoderKinds decoders_of() {
  return {{{decoder_kind<typename F::template Decoder<float>>(), decoder_kind<typename F::template Decoder<BFloat16>>(),
            decoder_kind<typename F::template Decoder<Float16>>()}}};
}

template <class... F>
struct FormatList {
  static_assert(sizeof...(F) == sparsec::kFormats, "one of each");
  static constexpr DecoderKinds decoders[] = {decoders_of<F>()...};
};
using Formats = FormatList<DenseKernels, CsrKernels, BitmapKernels, BsrKernels, NmKernels>;  // as numbered by sparsec::Format

constexpr DecoderKind kCodesDecoder = decoder_kind<CsrCodesDecoder>();

inline const DecoderKind& decoder_of(const sparsec::Matrix& w) {
  return w.format == sparsec::kCsrInt ? kCodesDecoder : Formats::decoders[w.format].kinds[w.codec][w.type];
}

using Tile = void (*)(const float* w, const float* x, const int32_t* starts, int64_t runs, int64_t run, float* acc);
const Tile kTiles[] = {tile<1>, tile<2>, tile<3>, tile<4>,
#if defined(__AVX2__)
                       tile<5>, tile<6>,
#endif
#if defined(__AVX512F__) || defined(SPARSEC_SIMDE)
                       tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>,
#endif
};

// Panels [first, first + panels), token by token: what is written then lies side by side.
template <class A, class Task>
void finish_panels(const Task& t, const float* sums, int64_t per_panel, int64_t first, int64_t panels) {
  for (int64_t token = 0; token < t.tokens; ++token) {
    A* const out = static_cast<A*>(t.out) + token * t.out_stride;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = 16 * (first + p);
      finish(load_lanes(sums + p * per_panel + 16 * token), static_cast<const A*>(t.matrix->bias), row, least(16, t.matrix->out_features - row), out);
    }
  }
}

constexpr int64_t kCachedFloats = 1 << 16;  // 256 KB

template <const DecoderKind& (*Kind)(const sparsec::Matrix&)>
void panels_by(const sparsec::PanelTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const DecoderKind& kind = Kind(w);
  const int64_t in = w.in_features, blocks = block_columns(w), rows = t.rows_per_tile;
  const Tile times = kTiles[rows - 1];
  float* const decoded = t.scratch;
  int32_t* const starts = reinterpret_cast<int32_t*>(decoded + 16 * (kDecodedColumns + blocks));
  float* const decoded2 = decoded + 16 * (kDecodedColumns + blocks) + kDecodedColumns + 2;
  float* const sums = decoded2 + 16 * kDecodedColumns;
  const int64_t per_panel = 16 * rows * t.tiles;
  const bool direct = kind.direct && t.tiles <= kDirectTiles;
  const int64_t step = !direct ? kDecodedColumns : t.tiles == 1 ? in : kDirectColumns;
  // Where all of x stays in a second-level cache, panels go one by one: one stream of reads instead of several.
  const int64_t group = in * rows * t.tiles <= kCachedFloats ? kPanelsAtOnce : kPanelGroup;
  AnyDecoder decoders[kPanelGroup];
  for (int64_t first = t.first; first < t.last; first += group) {
    const int64_t panels = least(group, t.last - first);
    for (int64_t p = 0; p < panels; ++p) kind.start(decoders[p], w, first + p);
    memset(sums, 0, sizeof(float) * per_panel * panels);
    for (int64_t begin = 0; begin < in; begin += step) {
      const int64_t end = least(in, begin + step);
      for (int64_t p = 0; p < panels; ++p) {
        float* const own = sums + p * per_panel;
        if (direct) {
          for (int64_t i = 0; i < t.tiles; ++i) {
            AnyDecoder again = decoders[p];
            kind.direct[rows - 1](i + 1 < t.tiles ? again : decoders[p], begin, end, t.x + i * in * rows, own + i * 16 * rows,
                                  t.tiles == 1 ? kBitmapAhead : kDirectAhead, t.tiles == 1 ? 2 : i);
          }
          continue;
        }
        const float* columns = decoded;
        starts[0] = static_cast<int32_t>(begin);
#if defined(SPARSEC_PANEL_PAIRS)
        if (!blocks && p + 1 < panels) {
          const float* columns2 = decoded2;
          kind.decode(decoders[p], w, begin, end, decoded, starts, &columns);
          kind.decode(decoders[++p], w, begin, end, decoded2, starts, &columns2);
          for (int64_t i = 0; i < t.tiles; ++i)
            kTilePairs[rows - 1](columns, columns2, t.x + (i * in + begin) * rows, end - begin, own + i * 16 * rows,
                                 own + per_panel + i * 16 * rows);
          continue;
        }
#endif
        const int64_t runs = kind.decode(decoders[p], w, begin, end, decoded, starts, &columns);
        const int64_t run = blocks ? blocks : end - begin;
        for (int64_t i = 0; i < t.tiles && runs > 0; ++i)
          times(columns, t.x + i * in * rows, starts, runs, run, own + i * 16 * rows);
      }
    }
    switch (w.type) {
      case sparsec::kFloat32: finish_panels<float>(t, sums, per_panel, first, panels); break;
      case sparsec::kBFloat16: finish_panels<BFloat16>(t, sums, per_panel, first, panels); break;
      default: finish_panels<Float16>(t, sums, per_panel, first, panels);
    }
  }
}

void panels(const sparsec::PanelTask& t) { panels_by<decoder_of>(t); }

// Registers: M * 16 / kRegister sums, one column, one broadcast.
#if defined(__AVX512F__) || defined(SPARSEC_SIMDE)
constexpr int64_t kRowsPerTile = 12;
#elif defined(__AVX2__)
constexpr int64_t kRowsPerTile = 6;
#elif defined(__aarch64__)
constexpr int64_t kRowsPerTile = 4;
#else
constexpr int64_t kRowsPerTile = 2;
#endif

// Row by row again, in x's type, for a dense product that has matrix instructions for it.
template <class A>
void expand_type(const sparsec::ExpandTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const DecoderKind& kind = decoder_of(w);
  const int64_t in = w.in_features, blocks = block_columns(w);
  float* const decoded = t.scratch;
  int32_t* const starts = reinterpret_cast<int32_t*>(decoded + 16 * (kDecodedColumns + blocks));
  AnyDecoder decoder;
  for (int64_t p = t.first; p < t.last; ++p) {
    kind.start(decoder, w, p);
    A* const rows = static_cast<A*>(t.out) + 16 * (p - t.first) * in;
    const int64_t count = least(16, w.out_features - 16 * p);
    if (blocks) memset(static_cast<void*>(rows), 0, sizeof(A) * count * in);
    for (int64_t begin = 0; begin < in; begin += kDecodedColumns) {
      const int64_t end = least(in, begin + kDecodedColumns);
      const float* columns = decoded;
      starts[0] = static_cast<int32_t>(begin);
      const int64_t runs = kind.decode(decoder, w, begin, end, decoded, starts, &columns);
      const int64_t run = blocks ? blocks : end - begin;
      for (int64_t i = 0; i < runs; ++i)
        for (int64_t k = 0; k < run; ++k, columns += 16)
          for (int64_t l = 0; l < count; ++l) narrow(columns[l], rows + l * in + starts[i] + k);
    }
  }
}
void expand(const sparsec::ExpandTask& t) {
  switch (t.matrix->type) {
    case sparsec::kFloat32: return expand_type<float>(t);
    case sparsec::kBFloat16: return expand_type<BFloat16>(t);
    default: return expand_type<Float16>(t);
  }
}

}  // namespace
