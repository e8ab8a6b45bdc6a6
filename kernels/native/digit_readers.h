// Readers of quantised values: what digits.h multiplies, and where it includes this.
#pragma once
#include "bsr.h"

namespace {

struct NoBlocks {
  static constexpr int kBits = 0;
};

// Readers give the steps of a panel, one after the other, and which of their values are kept.
struct DenseReader8 : NoBlocks {
  const uint8_t* next;
  DenseReader8(const sparsec::Matrix& w, int64_t panel, int64_t steps) : next(static_cast<const uint8_t*>(w.values) + panel * steps * 64) {}
  SPARSEC_DIGITS Quads take() {
    __builtin_prefetch(next + kDigitAhead);
    const Quads q = load8(next);
    next += 64;
    return q;
  }
  uint64_t bits() const { return ~0ull; }
};
struct DenseReader4 : NoBlocks {
  const uint8_t* next;
  Table table;
  SPARSEC_DIGITS DenseReader4(const sparsec::Matrix& w, int64_t panel, int64_t steps)
      : next(static_cast<const uint8_t*>(w.values) + panel * steps * 32), table(table_of(w.table)) {}
  SPARSEC_DIGITS Quads take() {
    __builtin_prefetch(next + kDigitAhead);
    const Quads q = load4(next, table);
    next += 32;
    return q;
  }
  uint64_t bits() const { return ~0ull; }
};
struct BitmapReader8 : NoBlocks {
  const uint8_t* next;
  const uint64_t* words;
  BitmapReader8(const sparsec::Matrix& w, int64_t panel, int64_t steps)
      : next(static_cast<const uint8_t*>(w.values) + w.start[panel]), words(static_cast<const uint64_t*>(w.columns) + panel * steps) {}
  SPARSEC_DIGITS Quads take() {
    uint64_t kept = *words++;
#if defined(__x86_64__)
    asm("" : "+r"(kept));  // in a general register: GCC would load a mask register and move it back to count
#endif
    __builtin_prefetch(next + kDigitAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(words) + kDigitAhead);
    const Quads q = expand8(next, kept);
    next += __builtin_popcountll(kept);
    return q;
  }
  uint64_t bits() const { return words[-1]; }
};
struct BitmapReader4 : NoBlocks {
  const uint8_t* next;
  const uint64_t* words;
  Table table;
  SPARSEC_DIGITS BitmapReader4(const sparsec::Matrix& w, int64_t panel, int64_t steps)
      : next(static_cast<const uint8_t*>(w.values) + w.start[panel]),
        words(static_cast<const uint64_t*>(w.columns) + panel * steps),
        table(table_of(w.table)) {}
  SPARSEC_DIGITS Quads take() {
    uint64_t kept = *words++;
#if defined(__x86_64__)
    asm("" : "+r"(kept));
#endif
    __builtin_prefetch(next + kDigitAhead);
    __builtin_prefetch(reinterpret_cast<const char*>(words) + kDigitAhead);
    const Quads q = expand4(next, kept, table);
    next += (__builtin_popcountll(kept) + 1) / 2;
    return q;
  }
  uint64_t bits() const { return words[-1]; }
};
// Steps of blocks, whatever their size: where no block stands nothing is kept.
template <int Bits>
struct BlockReader {
  static constexpr int kBits = Bits;
  struct Half {
    int64_t at, end, row;  // the next block, the last, and which of its rows is the first of eight
  };
  const sparsec::Matrix* w;
  Half halves[2];
  int64_t block = 0, inside = 0;  // the column of blocks, and the column in it, that is next
  uint64_t kept = 0;
  Table table;

  SPARSEC_DIGITS BlockReader(const sparsec::Matrix& matrix, int64_t panel, int64_t) : w(&matrix), table() {
    if (Bits == 4) table = table_of(matrix.table);
    for (int h = 0; h < 2; ++h) {
      const int64_t row = 16 * panel + 8 * h, b = row / w->r;
      halves[h] = row < w->out_features ? Half{w->start[b], w->start[b + 1], row % w->r} : Half{0, 0, 0};
    }
  }
  SPARSEC_DIGITS Quads take() {
    kept = 0;
    if (w->lane == 4) {
      const Quads first = half(0), second = half(1);
      go_on(4);
      return either(first, second);
    }
    uint8_t codes[64];
    memset(codes, 128, sizeof(codes));
    for (int i = 0; i < 4; ++i) {
      for (int h = 0; h < 2; ++h) {
        if (!stands(halves[h])) continue;
        const uint8_t* const from = place(halves[h]);
        for (int l = 0; l < 8; ++l) codes[32 * h + 4 * l + i] = from[l];
        kept |= 0x11111111ull << (32 * h + i);
      }
      go_on(1);
    }
    return load8(codes);
  }
  uint64_t bits() const { return kept; }

 private:
  bool stands(const Half& half) const { return half.at < half.end && block_column(*w, half.at) == block; }
  const uint8_t* place(const Half& half) const {
    return static_cast<const uint8_t*>(w->values) + ((half.at * w->c + inside) * w->r + half.row * w->lane) * Bits / 8;
  }
  void go_on(int columns) {
    inside += columns;
    if (inside < w->c) return;
    for (Half& half : halves) half.at += stands(half);
    inside = 0;
    ++block;
  }
  // Eight rows of a lane of four columns.
  SPARSEC_DIGITS Quads half(int h) {
    if (!stands(halves[h])) return absent(h);
    kept |= 0xffffffffull << 32 * h;
    const uint8_t* const from = place(halves[h]);
    if constexpr (Bits == 8) return half8(from, h);
    return half4(from, table, h);
  }
};
// The steps of one block: 16 rows of it, or 8, which are half h of a panel's.
template <int Bits, bool Whole>
struct BlockSteps {
  const uint8_t* next;
  int64_t stride;
  int h;
  Table table;
  SPARSEC_DIGITS BlockSteps(const sparsec::Matrix& w, int64_t block, int64_t row, int half)
      : next(static_cast<const uint8_t*>(w.values) + (block * w.c * w.r + 4 * row) * Bits / 8), stride(4 * w.r * Bits / 8), h(half), table() {
    if (Bits == 4) table = table_of(w.table);
  }
  SPARSEC_DIGITS Quads take() {
    __builtin_prefetch(next + kDigitAhead);
    const uint8_t* const from = next;
    next += stride;
    if constexpr (Whole) {
      if constexpr (Bits == 8) return load8(from);
      return load4(from, table);
    } else {
      if constexpr (Bits == 8) return half8(from, h);
      return half4(from, table, h);
    }
  }
};
// Steps that were expanded before, and which of their values are kept, where that is asked for.
struct ExpandedReader {
  const uint8_t* next;
  const uint64_t* words;
  SPARSEC_DIGITS Quads take() {
    const Quads q = load8(next);
    next += 64;
    ++words;
    return q;
  }
  uint64_t bits() const { return words[-1]; }
};

}  // namespace
