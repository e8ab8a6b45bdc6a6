// BSR: dense blocks of r output rows and c columns; lanes are output rows. Of each the columns of a lane stand side by side, or one alone
// where a lane's columns do not divide c, or the matrix was laid out for a GPU (w.lane).
//
// The including file defines `void load_half(Cursor<V> at, Eight (&columns)[2])`, where a lane holds two columns: half of a step.
#pragma once
#include "lanes.h"

namespace {

template <class I>
inline int64_t block_column(const void* columns, int64_t at) {
  return static_cast<const I*>(columns)[at];
}
inline int64_t block_column(const sparsec::Matrix& w, int64_t at) {
  return w.index == sparsec::kUInt16 ? block_column<uint16_t>(w.columns, at) : block_column<int32_t>(w.columns, at);
}

constexpr int64_t kBlockAhead = 1024;  // bytes

template <class C>
inline Eight load_eight(C at) {
  float f[8];
  widen8(at, f);
  return load_eight(static_cast<const float*>(f));
}

template <class C>
inline void load_eights(C at, Eight (&columns)[1]) {
  columns[0] = load_eight(at);
}
template <class C>
inline void load_eights(C at, Eight (&columns)[2]) {
  load_half(at, columns);
}

// Lanes [lane, lane + 8 * G) of the block rows, of L columns each. Neighbouring columns go to C sums, to hide the latency of the multiply-add.
template <int G, int64_t L, class V, class A, class I>
void bsr_lanes(const sparsec::Task& t, int64_t block_row, int64_t lane) {
  constexpr int C = G >= 4 ? 2 : 4;
  const sparsec::Matrix& w = *t.matrix;
  const float* x = static_cast<const float*>(t.x);
  const I* columns = static_cast<const I*>(w.columns);
  const int64_t r = w.r, c = w.c, begin = w.start[block_row], end = w.start[block_row + 1];
  Cursor<V> values = cursor<V>(w.values, begin * r * c + lane * L);
  Eight sums[C][G] = {};
  const auto step = [&](const float* xs, int64_t s) {
    __builtin_prefetch(address(values) + kBlockAhead);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      Eight eights[L];
      load_eights(values + 8 * L * g, eights);
#pragma GCC unroll 2
      for (int64_t i = 0; i < L; ++i) sums[(s + i) % C][g] += eights[i] * xs[i];
    }
    values += r * L;
  };
  int64_t at = begin;
  // Blocks of one column are taken C at a time, wider ones column by column.
  if (c == 1) {
    for (; at + C <= end; at += C)
#pragma GCC unroll 4
      for (int s = 0; s < C; ++s) step(x + columns[at + s], s);
  }
  for (; at < end; ++at) {
    const float* xb = x + static_cast<int64_t>(columns[at]) * c;
    int64_t k = 0;
    for (; k + C <= c; k += C)
#pragma GCC unroll 4
      for (int s = 0; s < C; s += L) step(xb + k + s, s);
    for (; k < c; k += L) step(xb + k, 0);
  }
  const int64_t row = block_row * r + lane;
  const A* bias = static_cast<const A*>(w.bias);
  A* out = static_cast<A*>(t.out);
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) {
    Eight sum = sums[0][g];
#pragma GCC unroll 4
    for (int s = 1; s < C; ++s) sum += sums[s][g];
    for (int l = 0; l < 8; ++l)
      narrow(bias ? sum[l] + widen(bias[row + 8 * g + l]) : sum[l], out + row + 8 * g + l);
  }
}

template <int64_t L, class V, class A, class I>
void bsr_rows(const sparsec::Task& t) {
  for (int64_t b = t.first; b < t.last; ++b) {
    int64_t lane = 0;
    for (; lane + 32 <= t.matrix->r; lane += 32) bsr_lanes<4, L, V, A, I>(t, b, lane);
    for (; lane + 16 <= t.matrix->r; lane += 16) bsr_lanes<2, L, V, A, I>(t, b, lane);
    for (; lane < t.matrix->r; lane += 8) bsr_lanes<1, L, V, A, I>(t, b, lane);
  }
}
template <class V, class A, class I>
void bsr_by_lane(const sparsec::Task& t) {
  t.matrix->lane == kLane<V> ? bsr_rows<kLane<V>, V, A, I>(t) : bsr_rows<1, V, A, I>(t);
}

template <class V, class A>
void bsr_one(const sparsec::Task& t) {
  t.matrix->index == sparsec::kUInt16 ? bsr_by_lane<V, A, uint16_t>(t) : bsr_by_lane<V, A, int32_t>(t);
}

// The stored columns of a panel. Where r is no multiple of 16, a panel's halves lie in two rows of blocks: their blocks are merged.
template <class V>
struct BsrDecoder {
  static constexpr bool kDirect = false;
  struct Half {
    int64_t at, end, lane;
  };
  Half halves[2];

  BsrDecoder() = default;
  BsrDecoder(const sparsec::Matrix& w, int64_t panel) {
    for (int h = 0; h < 2; ++h) {
      const int64_t row = 16 * panel + 8 * h;
      const int64_t b = row / w.r;
      halves[h] = row < w.out_features ? Half{w.start[b], w.start[b + 1], row % w.r} : Half{0, 0, 0};
    }
  }

  // Blocks that begin before `end`. Their columns go to `to`, where each begins to `starts`; returns their number.
  int64_t decode(const sparsec::Matrix& w, int64_t, int64_t end, float* to, int32_t* starts, const float** in_place) {
    const Cursor<V> values = cursor<V>(w.values, 0);
    const int64_t r = w.r, c = w.c, limit = (end + c - 1) / c;
    int64_t found = 0;
    if (r % 16 == 0) {
      Half& h = halves[0];
      const int64_t first = h.at;
      for (int64_t column; h.at < h.end && (column = block_column(w, h.at)) < limit; ++h.at)
        starts[found++] = static_cast<int32_t>(column * c);
      if constexpr (kAsTheyAre<V>)
        if (r == 16) {  // the values are a decoded panel already
          *in_place = values + first * 16 * c;
          return found;
        }
      for (int64_t at = first; at < h.at; ++at, to += 16 * c) {
        columns(w, at, h.lane, to);
        columns(w, at, h.lane + 8, to + 8);
      }
      return found;
    }
    for (;;) {
      int64_t next = limit;
      for (const Half& h : halves)
        if (h.at < h.end) next = least(next, block_column(w, h.at));
      if (next == limit) return found;
      starts[found++] = static_cast<int32_t>(next * c);
      float* lanes = to;
      for (Half& h : halves) {
        const bool has = h.at < h.end && block_column(w, h.at) == next;
        if (has)
          columns(w, h.at, h.lane, lanes);
        else
          for (int64_t k = 0; k < c; ++k) memset(lanes + 16 * k, 0, 32);
        h.at += has;
        lanes += 8;
      }
      to += 16 * c;
    }
  }

 private:
  // Eight lanes of all columns of a block, to every sixteenth place.
  static void columns(const sparsec::Matrix& w, int64_t block, int64_t lane, float* to) {
    Cursor<V> from = cursor<V>(w.values, block * w.c * w.r + lane * w.lane);
    if (w.lane == 1) {
      for (int64_t k = 0; k < w.c; ++k, from += w.r, to += 16) widen8(from, to);
      return;
    }
    for (int64_t k = 0; k < w.c; k += kLane<V>, from += w.r * kLane<V>, to += 16 * kLane<V>) {
      Eight eights[kLane<V>];
      load_eights(from, eights);
      for (int64_t i = 0; i < kLane<V>; ++i) memcpy(to + 16 * i, &eights[i], 32);
    }
  }
};

struct BsrKernels : NoKernels {
  template <class V>
  using Decoder = BsrDecoder<V>;
  template <class V, class A>
  static constexpr sparsec::Kernel one = bsr_one<V, A>;
};

}  // namespace
