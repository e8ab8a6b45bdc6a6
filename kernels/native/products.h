// One or several matrices times the same x: which kernel, in which pieces, on which thread.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "choice.h"
#include "inputs.h"

namespace {

using sparsec::AmxTask;
using sparsec::ExpandTask;
using sparsec::kPanel;
using sparsec::Matrix;
using sparsec::PanelTask;
using sparsec::Task;
using torch::stable::Tensor;

constexpr int64_t kBytesPerThread = 1 << 16;  // of a matrix, worth waking a thread for: some 5 us
constexpr int64_t kLeastPiece = 1 << 16;      // bytes worth asking for: some 5 us

constexpr int64_t kFewRows = 8;

// Up to how many rows of x CSR's non-zeros are multiplied one by one, 32 rows at a time; beyond, panels win, although they save no FLOPs.
// Measured on Zen 3, fp32 2048x2048, 128 rows, one thread, as a ratio to F.linear: at 50 % zeros 0.71x against 0.8-0.9x of a dense product;
// at 70 % 1.13x; at 90 % 3.2x against 0.94x. Where x no longer fits the second-level cache, or the CPU has matrix instructions for the
// type, nothing is known beyond 32 rows.
bool one_by_one(const Matrix& w, int64_t tokens) {
  const bool sparse = 10 * w.stored <= 3 * w.out_features * w.in_features;
  return tokens <= 32 || (sparse && w.in_features <= 4096 && !has_half_product(w.type));
}

// Blocks must not reach from one run of columns into the next.
bool fits_tiles(const Matrix& w) { return w.type == sparsec::kBFloat16 && (w.format != sparsec::kBsr || sparsec::kAmxColumns % w.c == 0); }

Way way(const Matrix& w, int64_t tokens, const InstructionSet& isa) {
  if (w.type == sparsec::kFloat64) return w.format == sparsec::kDense ? Way::stock : Way::one;
  if (tokens == 1) return Way::one;
  if (w.format == sparsec::kDense) {
    if (tokens <= kFewRows) return Way::rows;
    return w.type == sparsec::kFloat32 || has_half_product(w.type) ? Way::stock : Way::panels;
  }
  if (w.format == sparsec::kCsr && one_by_one(w, tokens)) return Way::lanes;
  if (isa.amx && fits_tiles(w)) return Way::amx;
  if (w.format == sparsec::kNm && tokens <= kFewRows) return Way::rows;
  return has_half_product(w.type) && tokens > 32 ? Way::half : Way::panels;
}

struct Part {
  Matrix matrix;
  void* out = nullptr;  // [tokens][out_features]
  Way way = Way::one;
};

// x of a product.
struct Input {
  const void* data;   // [tokens][in] of the matrices' type
  const float* wide;  // the same in fp32, or null
  int64_t tokens;
  int32_t dtype;      // torch's number of the type
};

// ---- pieces of work ------------------------------------------------------------------------------------------------------

int64_t value_bytes(const Matrix& w) {
  constexpr int64_t bytes[] = {4, 2, 2, 8};
  return bytes[w.type];
}

// Bytes read for the units before `unit`: a * start[unit] + b * unit.
struct Bytes {
  int64_t per_start = 0, per_unit = 0;
  const int32_t* start;

  explicit Bytes(const Matrix& w) : start(w.start) {
    const int64_t value = value_bytes(w);
    constexpr int64_t index[] = {2, 4, 1};
    switch (w.format) {
      case sparsec::kDense: per_unit = value * w.in_features; break;
      case sparsec::kCsr: per_start = value + index[w.index]; per_unit = 16; break;
      case sparsec::kBitmap: per_start = value; per_unit = 4 * w.in_features; break;  // a column costs time beside its bits
      case sparsec::kBsr: per_start = value * w.r * w.c + index[w.index]; per_unit = 16 * w.r; break;
      default: per_unit = (value * kPanel + w.c) * w.r * (w.in_features / w.c);
    }
  }
  int64_t before(int64_t unit) const { return per_unit * unit + (start ? per_start * start[unit] : 0); }
};

// Units [first, last) of one part.
struct Piece {
  const Part* part;
  int64_t first;
  int64_t last;
};

int64_t work_of(const Part& part, int64_t tokens) {
  return Bytes(part.matrix).before(part.matrix.units) * std::max<int64_t>(1, tokens / 4);
}

bool is_shared(const Part& part) { return part.way != Way::half && part.way != Way::stock; }

// Pieces that shrink: `threads` of them take three quarters of the work, as many three quarters of the rest, and so on. A thread that
// comes late, or whose CPU is taken away, leaves more of them to the others, and all end together ("factoring": Hummel, Schonberg and
// Flynn, "Factoring: a method for scheduling parallel loops", Communications of the ACM 35(8), 1992). Pieces of equal size were 1.15
// times as slow on 576x1536, 1.4 times where there were three of them for two threads.
std::vector<Piece> split(const std::vector<Part>& parts, int64_t tokens, int64_t threads) {
  std::vector<Piece> pieces;
  int64_t rest = 0;
  for (const Part& part : parts)
    if (is_shared(part)) rest += work_of(part, tokens);
  const int64_t least = kLeastPiece * std::max<int64_t>(1, tokens / 4);
  int64_t size = rest, left = 0;  // of a piece, and of the one that is being cut
  int64_t turn = threads - 1;
  const auto next_piece = [&] {
    if (++turn == threads) {
      turn = 0;
      size = threads == 1 ? rest : std::max(least, rest * 3 / (4 * threads));
    }
    left = size;
  };
  next_piece();
  for (const Part& part : parts) {
    if (!is_shared(part)) continue;
    const Matrix& w = part.matrix;
    const bool panels = part.way == Way::panels || part.way == Way::amx;  // the unit is then a panel of 16 rows, whatever rows_per_unit is
    const int64_t units = panels ? (w.out_features + kPanel - 1) / kPanel : w.units;
    const Bytes bytes(w);
    const int64_t scale = std::max<int64_t>(1, tokens / 4);
    const auto before = [&](int64_t u) {
      return scale * bytes.before(panels ? std::min(w.units, u * kPanel / w.rows_per_unit) : u);
    };
    for (int64_t first = 0; first < units;) {
      const int64_t start = before(first), end = start + left;
      int64_t low = first + 1, last = units;  // the first unit before which there is enough
      while (low < last) {
        const int64_t middle = (low + last) / 2;
        if (before(middle) < end)
          low = middle + 1;
        else
          last = middle;
      }
      if (panels && last < units) last += (last - first) % 2;  // panels are multiplied in pairs
      pieces.push_back(Piece{&part, first, last});
      const int64_t taken = before(last) - start;
      rest -= taken;
      left -= taken;
      if (left <= 0) next_piece();
      first = last;
    }
  }
  return pieces;
}

// Memory of one thread that grows and stays: fresh pages at every call would cost more than small products.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

// Of the panels' way: their part of x and their sums stay in a second-level cache, which CPUs with AVX-512 have of 1 MB and more.
int64_t tokens_at_once(const InstructionSet& isa) { return isa.rows_per_tile >= 12 ? 516 : 240; }

constexpr int64_t kTilesAtOnce = 32;    // of 16 tokens: W is decoded anew for each of these

void run(const Piece& piece, const Rows& x, const InstructionSet& isa) {
  const Part& part = *piece.part;
  const Matrix& w = part.matrix;
  switch (part.way) {
    case Way::lanes:
      for (int64_t g = 0; g < x.lanes.groups; ++g) {
        const int64_t lanes = x.lanes.lanes, done = g * lanes;
        int group = 0;
        while (sparsec::kLanes[group] < lanes) ++group;
        isa.lanes[group][w.type](Task{&w, x.lanes.memory.get() + done * x.in,
                                      static_cast<char*>(part.out) + value_bytes(w) * done * w.out_features, w.out_features,
                                      std::min(lanes, x.tokens - done), piece.first, piece.last});
      }
      return;
    case Way::panels: {
      const int64_t rows = x.tiles.lanes, tiles = std::max<int64_t>(1, tokens_at_once(isa) / rows);
      const int64_t blocks = w.format == sparsec::kBsr ? w.c : 0;
      for (int64_t tile = 0; tile < x.tiles.groups; tile += tiles) {
        const int64_t count = std::min(tiles, x.tiles.groups - tile), done = tile * rows;
        isa.panels(PanelTask{&w, x.tiles.memory.get() + done * x.in, count, rows,
                             static_cast<char*>(part.out) + value_bytes(w) * done * w.out_features, w.out_features,
                             std::min(count * rows, x.tokens - done), piece.first, piece.last,
                             scratch(sparsec::panel_scratch(blocks, count * rows))});
      }
      return;
    }
    case Way::amx: {
      const int64_t across = (x.in + 31) / 32, blocks = w.format == sparsec::kBsr ? w.c : 0;
      for (int64_t tile = 0; tile < x.tiled.tiles; tile += kTilesAtOnce) {
        const int64_t count = std::min(kTilesAtOnce, x.tiled.tiles - tile), done = 16 * tile;
        char* const memory = reinterpret_cast<char*>(scratch(sparsec::amx_scratch(blocks, count) / 4 + 16));
        isa.amx(AmxTask{&w, x.tiled.data + tile * across * 512, count,
                        static_cast<char*>(part.out) + value_bytes(w) * done * w.out_features, w.out_features,
                        std::min(16 * count, x.tokens - done), piece.first, piece.last,
                        memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64});
      }
      return;
    }
    default: {
      const sparsec::Kernel kernel = part.way == Way::rows ? isa.rows[w.format == sparsec::kNm][w.type] : isa.one[w.format][w.type];
      kernel(Task{&w, x.plain, part.out, w.out_features, x.tokens, piece.first, piece.last});
    }
  }
}

// ---- torch's dense product -----------------------------------------------------------------------------------------------

// A tensor over memory of ours.
Tensor view(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int32_t dtype) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// x [tokens, in] @ weight [rows, in].T into out [tokens, rows].
void dense_product(const Tensor& x, const Tensor& weight_t, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight_t),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
void add_bias(T* out, const T* bias, int64_t tokens, int64_t rows, int64_t stride) {
  if (!bias) return;
  torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, 16384 / rows), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t r = 0; r < rows; ++r) narrow(widen(out[t * stride + r]) + widen(bias[r]), out + t * stride + r);
  });
}

constexpr int64_t kHalfPanelRows = 256;

// Panels of W expanded into the half type, then the dense product of that type.
template <class T>
void half_rows(const Part& part, const Input& x, const InstructionSet& isa) {
  const Matrix& w = part.matrix;
  const int64_t in = w.in_features, tokens = x.tokens;
  std::unique_ptr<T[]> expanded(new T[kHalfPanelRows * std::max<int64_t>(1, in)]);
  const Tensor rows = view(const_cast<void*>(x.data), tokens, in, in, 1, x.dtype);
  T* const out = static_cast<T*>(part.out);
  for (int64_t first = 0; first < w.out_features; first += kHalfPanelRows) {
    const int64_t count = std::min(kHalfPanelRows, w.out_features - first);
    const int64_t panel = first / kPanel, panels = (count + kPanel - 1) / kPanel;
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      const int64_t blocks = w.format == sparsec::kBsr ? w.c : 0;
      isa.expand(ExpandTask{&w, expanded.get() + begin * kPanel * in, panel + begin, panel + end,
                            scratch(sparsec::panel_scratch(blocks, 0))});
    });
    Tensor target = view(out + first, tokens, count, w.out_features, 1, x.dtype);
    dense_product(rows, view(expanded.get(), in, count, 1, in, x.dtype), target);
    add_bias(out + first, w.bias ? static_cast<const T*>(w.bias) + first : nullptr, tokens, count, w.out_features);
  }
}

template <class T>
void stock_rows(const Part& part, const Input& x) {
  const Matrix& w = part.matrix;
  const int64_t in = w.in_features, tokens = x.tokens;
  Tensor target = view(part.out, tokens, w.out_features, w.out_features, 1, x.dtype);
  dense_product(view(const_cast<void*>(x.data), tokens, in, in, 1, x.dtype),
                view(const_cast<void*>(w.values), in, w.out_features, 1, in, x.dtype), target);
  add_bias(static_cast<T*>(part.out), static_cast<const T*>(w.bias), tokens, w.out_features, w.out_features);
}

// ---- all parts -------------------------------------------------------------------------------------------------------------

// Every part's `out` is there and not empty.
void multiply(std::vector<Part>& parts, const Input& x) {
  const InstructionSet& isa = *chosen.load(std::memory_order_relaxed);
  const int64_t in = parts[0].matrix.in_features, tokens = x.tokens;
  Rows rows{parts[0].matrix.type, x.data, tokens, in, x.wide, nullptr, {}, {}};
  int64_t work = 0;
  for (Part& part : parts) {
    const Matrix& w = part.matrix;
    part.way = way(w, tokens, isa);
    if (part.way == Way::half) {
      by_type(w.type, [&](auto zero) { half_rows<decltype(zero)>(part, x, isa); });
    } else if (part.way == Way::stock) {
      by_type(w.type, [&](auto zero) { stock_rows<decltype(zero)>(part, x); });
    } else {
      rows.prepare(part.way, isa);
      work += work_of(part, tokens);
    }
  }
  const int64_t threads =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work / kBytesPerThread));
  const std::vector<Piece> pieces = split(parts, tokens, threads);
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (threads == 1) {
    for (const Piece& piece : pieces) run(piece, rows, isa);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(pieces[i], rows, isa);
  });
}

}  // namespace
