// x as the kernels read it: widened, or in groups of rows that lie side by side.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "kernels.h"
#include "region.h"

namespace {

// How a product is done. `one`: a row of x. `rows`: dense and N:M, few rows. `lanes`: CSR, where multiplying only what is kept saves work.
// `panels`: decode once, multiply with all rows. `half`: decode into the half type, for a CPU with matrix instructions for it.
// `pairs`: the same by products of pairs of bf16. `amx`: decode into matrix tiles. `stock`: torch's own dense product.
// `digits`: quantised values, any number of rows.
enum class Way { one, rows, lanes, panels, half, pairs, amx, stock, digits };

template <class F>
void by_type(sparsec::ValueType type, F f) {
  switch (type) {
    case sparsec::kFloat32: return f(float{});
    case sparsec::kBFloat16: return f(BFloat16{});
    case sparsec::kFloat16: return f(Float16{});
    default: return f(double{});
  }
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t Choice __attribute__((vector_size(16)));
#if defined(__clang__)
#define SPARSEC_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SPARSEC_PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, Choice{i, j, k, l})
#endif

// Columns [from, until) of four rows, each column in one piece: out[k * stride + row].
inline void turn_rows(const float* rows, int64_t in, int64_t from, int64_t until, float* out, int64_t stride) {
  int64_t k = from;
  for (; k + 4 <= until; k += 4) {
    Four v[4];
    for (int i = 0; i < 4; ++i) memcpy(&v[i], rows + i * in + k, 16);
    const Four low01 = SPARSEC_PICK(v[0], v[1], 0, 4, 1, 5), high01 = SPARSEC_PICK(v[0], v[1], 2, 6, 3, 7);
    const Four low23 = SPARSEC_PICK(v[2], v[3], 0, 4, 1, 5), high23 = SPARSEC_PICK(v[2], v[3], 2, 6, 3, 7);
    const Four columns[] = {SPARSEC_PICK(low01, low23, 0, 1, 4, 5), SPARSEC_PICK(low01, low23, 2, 3, 6, 7),
                            SPARSEC_PICK(high01, high23, 0, 1, 4, 5), SPARSEC_PICK(high01, high23, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) memcpy(out + (k + i) * stride, &columns[i], 16);
  }
  for (; k < until; ++k)
    for (int i = 0; i < 4; ++i) out[k * stride + i] = rows[i * in + k];
}

// The same of all rows of a group that are there; returns how many were turned. The last four may be so twice.
inline int64_t turn_group(const float* rows, int64_t in, int64_t present, int64_t from, int64_t until, float* out, int64_t stride) {
  if (present < 4) return 0;
  for (int64_t l = 0; l < present; l += 4) {
    const int64_t row = std::min(l, present - 4);
    turn_rows(rows + row * in, in, from, until, out + row, stride);
  }
  return present;
}

// x [tokens][in] in groups of `lanes` rows, fp32 [groups][in][lanes], absent rows 0.
struct Grouped {
  std::unique_ptr<float[]> memory;
  int64_t groups = 0;
  int64_t lanes = 0;

  template <class T>
  void fill(const T* x, int64_t tokens, int64_t in, int64_t rows) {
    lanes = rows;
    groups = (tokens + lanes - 1) / lanes;
    memory.reset(new float[std::max<int64_t>(1, groups * in * lanes)]);
    float* const to = memory.get();
    const int64_t fours = (in + 3) / 4;  // columns
    spread(groups * fours, std::max<int64_t>(1, 16384 / lanes), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin / fours; group * fours < end; ++group) {
        const int64_t first = group * lanes, present = std::min(lanes, tokens - first);
        const int64_t from = 4 * std::max<int64_t>(0, begin - group * fours), until = std::min(in, 4 * (end - group * fours));
        float* const out = to + first * in;
        int64_t l = 0;
        if constexpr (std::is_same_v<T, float>) l = turn_group(x + first * in, in, present, from, until, out, lanes);
        for (; l < lanes; ++l)
          for (int64_t k = from; k < until; ++k) out[k * lanes + l] = l < present ? widen(x[(first + l) * in + k]) : 0.0f;
      }
    });
  }
};

// x [tokens][in] of a 16-bit type in tiles of 16 rows and 32 columns, each in one piece: [tiles][ceil(in / 32)][16][32].
struct Tiled {
  std::unique_ptr<uint16_t[]> memory;
  uint16_t* data = nullptr;  // at a multiple of 64 bytes
  int64_t tiles = 0;

  void fill(const uint16_t* x, int64_t tokens, int64_t in) {
    const int64_t across = (in + 31) / 32;
    tiles = (tokens + 15) / 16;
    memory.reset(new uint16_t[tiles * across * 512 + 32]);
    data = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / 2;
    spread(tiles * across, 64, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t first = at / across * 16, k = at % across * 32, columns = std::min<int64_t>(32, in - k);
        const uint16_t* const from = x + first * in + k;
        uint16_t* const to = data + at * 512;
        if (columns == 32 && first + 16 <= tokens) {
          for (int64_t row = 0; row < 16; ++row) memcpy(to + row * 32, from + row * in, 64);
          continue;
        }
        for (int64_t row = 0; row < 16; ++row) {
          const int64_t present = first + row < tokens ? columns : 0;
          if (present) memcpy(to + row * 32, from + row * in, 2 * present);
          memset(to + row * 32 + present, 0, 2 * (32 - present));
        }
      }
    });
  }
};

// x [tokens][in] of a 16-bit type, two columns side by side, in groups of rows: [groups][ceil(in / 2)][lanes], absent ones 0.
struct Paired {
  std::unique_ptr<uint32_t[]> memory;
  int64_t groups = 0;
  int64_t lanes = 0;

  void fill(const uint16_t* x, int64_t tokens, int64_t in, int64_t rows) {
    lanes = rows;
    groups = (tokens + lanes - 1) / lanes;
    const int64_t steps = (in + 1) / 2;
    memory.reset(new uint32_t[std::max<int64_t>(1, groups * steps * lanes)]);
    uint32_t* const to = memory.get();
    if (lanes == 1 && tokens == 1) {  // whose columns lie side by side as they are
      if (in % 2) to[steps - 1] = 0;
      if (in) memcpy(to, x, static_cast<size_t>(2 * in));
      return;
    }
    constexpr int64_t kRun = 64;  // steps: of a group they stay in a first-level cache
    const int64_t runs = (steps + kRun - 1) / kRun;
    spread(groups * runs, std::max<int64_t>(1, 16384 / (lanes * kRun)), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t first = at / runs * lanes, from = at % runs * kRun, until = std::min(steps, from + kRun);
        uint32_t* const group = to + first * steps;
        const int64_t present = std::min(lanes, tokens - first);
        int64_t l = 0;
        if (in % 2 == 0)  // all pairs lie in rows of numbers of four bytes
          l = turn_group(reinterpret_cast<const float*>(x + first * in), steps, present, from, until, reinterpret_cast<float*>(group), lanes);
        for (; l < lanes; ++l)
          for (int64_t k = from; k < until; ++k) {
            uint32_t pair = 0;
            if (l < present) memcpy(&pair, x + (first + l) * in + 2 * k, 2 * k + 1 < in ? 4 : 2);
            group[k * lanes + l] = pair;
          }
      }
    });
  }
};

// x [tokens][in] as digits, in tiles of rows, for matrices like w.
struct Digits {
  std::unique_ptr<uint32_t[]> numbers;
  std::unique_ptr<float[]> scale;
  std::unique_ptr<int32_t[]> begin, before;  // the latter null where no step is skipped
  int64_t count, columns, rows, tiles, steps, groups;

  Digits(const float* x, int64_t tokens, int64_t in, const sparsec::Matrix& w, int64_t rows_of_tile, const sparsec::InstructionSet& isa)
      : count(w.digits),
        columns(sparsec::digit_columns(w)),
        rows(rows_of_tile),
        tiles((tokens + rows - 1) / rows),
        steps((in + 3) / 4),
        groups((in + columns - 1) / columns) {
    numbers.reset(new uint32_t[std::max<int64_t>(1, tiles * steps * rows * count)]);
    scale.reset(new float[std::max<int64_t>(1, tiles * groups * rows)]);
    begin.reset(new int32_t[std::max<int64_t>(1, tiles * groups * rows * count)]);
    if (sparsec::skips_steps(w)) before.reset(new int32_t[tiles * (steps + 1) * rows * count]);
    const std::unique_ptr<float[]> absent(tokens < tiles * rows ? new float[std::max<int64_t>(1, in)]() : nullptr);
    spread(tiles * rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, in)), [&](int64_t first, int64_t last) {
      for (int64_t token = first; token < last; ++token) {
        const int64_t tile = token / rows, row = token % rows;
        isa.digitize(sparsec::DigitizeTask{token < tokens ? x + token * in : absent.get(), in, columns, count, rows,
                                           numbers.get() + (tile * steps * rows + row) * count, scale.get() + tile * groups * rows + row,
                                           begin.get() + (tile * groups * rows + row) * count,
                                           before ? before.get() + (tile * (steps + 1) * rows + row) * count : nullptr});
      }
    });
  }
};

struct Rows {
  sparsec::ValueType type;
  const void* data;
  int64_t tokens;
  int64_t in;
  const void* plain;  // [tokens][in] in fp32 (fp64 as it is), or null as long as nobody has asked
  std::unique_ptr<float[]> widened;
  Grouped lanes, tiles;
  Paired paired;
  Tiled tiled;
  std::vector<Digits> digits;

  // Of a tile: a power of two, as many as registers serve at most.
  static int64_t digit_rows(const sparsec::Matrix& w, int64_t tokens, const sparsec::InstructionSet& isa) {
    const int64_t most = w.middle && isa.digit_rows > 2 ? isa.digit_rows / 2 : isa.digit_rows;
    int64_t rows = 1;
    while (rows < std::min(tokens, most)) rows *= 2;
    return rows;
  }
  // Null where they were not prepared.
  const Digits* digits_of(const sparsec::Matrix& w, const sparsec::InstructionSet& isa) const {
    const int64_t columns = sparsec::digit_columns(w), row_count = digit_rows(w, tokens, isa);
    for (const Digits& known : digits)
      if (known.columns == columns && known.rows == row_count && known.count == w.digits && (known.before || !sparsec::skips_steps(w))) return &known;
    return nullptr;
  }
  void prepare_digits(const sparsec::Matrix& w, const sparsec::InstructionSet& isa) {
    if (!digits_of(w, isa)) digits.emplace_back(static_cast<const float*>(plain), tokens, in, w, digit_rows(w, tokens, isa), isa);
  }

  void prepare(Way way, const sparsec::InstructionSet& isa) {
    by_type(type, [&](auto zero) {
      using T = decltype(zero);
      const T* x = static_cast<const T*>(data);
      if constexpr (std::is_same_v<T, double>) {
        plain = x;
      } else {
        if ((way == Way::one || way == Way::rows || way == Way::digits) && !plain) widen_all(x, isa);
        if constexpr (sizeof(T) == 2) {
          if (way == Way::one && isa.pairs && !paired.memory) paired.fill(static_cast<const uint16_t*>(data), 1, in, 1);
          if (way == Way::pairs && !paired.memory) paired.fill(static_cast<const uint16_t*>(data), tokens, in, rows_at_once(isa));
        }
        if (way == Way::lanes && !lanes.memory) {
          int group = 0;
          while (group + 1 < sparsec::kLaneCounts && sparsec::kLanes[group] < tokens) ++group;
          lanes.fill(x, tokens, in, sparsec::kLanes[group]);
        }
        if (way == Way::amx && !tiled.memory) tiled.fill(static_cast<const uint16_t*>(data), tokens, in);
        if (way == Way::panels && !tiles.memory) {
          tiles.fill(x, tokens, in, rows_at_once(isa));
        }
      }
    });
  }

  // As many as tiles of equal size have, at most as many as registers serve.
  int64_t rows_at_once(const sparsec::InstructionSet& isa) const {
    const int64_t count = (tokens + isa.rows_per_tile - 1) / isa.rows_per_tile;
    return (tokens + count - 1) / count;
  }

  // From now on nothing is read that is not part of this.
  void own() {
    if (!plain || plain == widened.get()) return;
    const int64_t floats = tokens * in * (type == sparsec::kFloat64 ? 2 : 1);
    widened.reset(new float[std::max<int64_t>(1, floats)]);
    memcpy(widened.get(), plain, static_cast<size_t>(4 * floats));
    plain = widened.get();
  }

  template <class T>
  void widen_all(const T* x, const sparsec::InstructionSet& isa) {
    if constexpr (std::is_same_v<T, float>) {
      plain = x;
    } else {
      widened.reset(new float[std::max<int64_t>(1, tokens * in)]);
      spread(tokens, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, in)), [&](int64_t first, int64_t last) {
        isa.widen[type](x + first * in, widened.get() + first * in, (last - first) * in);
      });
      plain = widened.get();
    }
  }
};

}  // namespace
