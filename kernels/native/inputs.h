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
// `stock`: torch's own dense product.
enum class Way { one, rows, lanes, panels, half, stock };

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

struct Rows {
  sparsec::ValueType type;
  const void* data;
  int64_t tokens;
  int64_t in;
  const void* plain = nullptr;  // [tokens][in] in fp32 (fp64 as it is)
  std::unique_ptr<float[]> widened;
  Grouped lanes, tiles;

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
