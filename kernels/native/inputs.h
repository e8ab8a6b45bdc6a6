// x as the kernels read it: widened, or in groups of rows that lie side by side.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "convert.h"
#include "kernels.h"

namespace {

// How a product is done. `one`: a row of x. `rows`: dense and N:M, few rows. `lanes`: CSR, where multiplying only what is kept saves work.
// `panels`: decode once, multiply with all rows. `half`: decode into the half type, for a CPU with matrix instructions for it.
// `amx`: decode into matrix tiles. `stock`: torch's own dense product.
enum class Way { one, rows, lanes, panels, half, amx, stock };

template <class F>
void by_type(sparsec::ValueType type, F f) {
  switch (type) {
    case sparsec::kFloat32: return f(float{});
    case sparsec::kBFloat16: return f(BFloat16{});
    case sparsec::kFloat16: return f(Float16{});
    default: return f(double{});
  }
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
    torch::stable::parallel_for(0, groups * in, std::max<int64_t>(1, 65536 / lanes), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t first = at / in * lanes, k = at % in;
        for (int64_t l = 0; l < lanes; ++l) to[at * lanes + l] = first + l < tokens ? widen(x[(first + l) * in + k]) : 0.0f;
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
    torch::stable::parallel_for(0, tiles * across, 64, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t first = at / across * 16, k = at % across * 32, columns = std::min<int64_t>(32, in - k);
        for (int64_t row = 0; row < 16; ++row) {
          uint16_t* const to = data + at * 512 + row * 32;
          const int64_t present = first + row < tokens ? columns : 0;
          if (present) memcpy(to, x + (first + row) * in + k, 2 * present);
          memset(to + present, 0, 2 * (32 - present));
        }
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
  Tiled tiled;

  void prepare(Way way, const sparsec::InstructionSet& isa) {
    by_type(type, [&](auto zero) {
      using T = decltype(zero);
      const T* x = static_cast<const T*>(data);
      if constexpr (std::is_same_v<T, double>) {
        plain = x;
      } else {
        if ((way == Way::one || way == Way::rows) && !plain) widen_all(x);
        if (way == Way::lanes && !lanes.memory) {
          int group = 0;
          while (group + 1 < sparsec::kLaneCounts && sparsec::kLanes[group] < tokens) ++group;
          lanes.fill(x, tokens, in, sparsec::kLanes[group]);
        }
        if (way == Way::amx && !tiled.memory) tiled.fill(static_cast<const uint16_t*>(data), tokens, in);
        if (way == Way::panels && !tiles.memory) {
          const int64_t count = (tokens + isa.rows_per_tile - 1) / isa.rows_per_tile;
          tiles.fill(x, tokens, in, (tokens + count - 1) / count);
        }
      }
    });
  }

  template <class T>
  void widen_all(const T* x) {
    if constexpr (std::is_same_v<T, float>) {
      plain = x;
    } else {
      widened.reset(new float[std::max<int64_t>(1, tokens * in)]);
      for (int64_t i = 0; i < tokens * in; ++i) widened[i] = widen(x[i]);
      plain = widened.get();
    }
  }
};

}  // namespace
