// One or several matrices times the same x: which kernel, in which pieces, on which thread.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "choice.h"
#include "pieces.h"
#include "region.h"
#include "stock.h"

namespace {

using sparsec::AmxTask;
using sparsec::PanelTask;
using sparsec::Task;

// Of the panels' way: their part of x and their sums stay in a second-level cache, which CPUs with AVX-512 have of 1 MB and more.
int64_t tokens_at_once(const InstructionSet& isa) { return isa.rows_per_tile >= 12 ? 516 : 240; }

constexpr int64_t kTilesAtOnce = 32;    // of 16 tokens: W is decoded anew for each of these

// Where output row r of token t goes: data + (t * width + r) * result_bytes.
struct Target {
  char* data;
  int64_t width;
};

void run(const Part& part, const Piece& piece, const Rows& x, const InstructionSet& isa, const Target& to) {
  const Matrix& w = part.matrix;
  switch (part.way) {
    case Way::lanes:
      for (int64_t g = 0; g < x.lanes.groups; ++g) {
        const int64_t lanes = x.lanes.lanes, done = g * lanes;
        int group = 0;
        while (sparsec::kLanes[group] < lanes) ++group;
        isa.formats[w.format].lanes[group][w.codec][w.type](Task{&w, x.lanes.memory.get() + done * x.in, nullptr,
                                      to.data + result_bytes(w) * done * to.width, to.width,
                                      std::min(lanes, x.tokens - done), piece.first, piece.last});
      }
      return;
    case Way::panels: {
      const int64_t rows = x.tiles.lanes, tiles = std::max<int64_t>(1, tokens_at_once(isa) / rows);
      for (int64_t tile = 0; tile < x.tiles.groups; tile += tiles) {
        const int64_t count = std::min(tiles, x.tiles.groups - tile), done = tile * rows;
        isa.panels(PanelTask{&w, x.tiles.memory.get() + done * x.in, count, rows,
                             to.data + result_bytes(w) * done * to.width, to.width,
                             std::min(count * rows, x.tokens - done), piece.first, piece.last,
                             scratch(sparsec::panel_scratch(block_columns(w), count * rows))});
      }
      return;
    }
    case Way::pairs: {
      const int64_t rows = x.paired.lanes, tiles = std::max<int64_t>(1, tokens_at_once(isa) / rows), steps = (x.in + 1) / 2;
      for (int64_t tile = 0; tile < x.paired.groups; tile += tiles) {
        const int64_t count = std::min(tiles, x.paired.groups - tile), done = tile * rows;
        isa.pairs(sparsec::PairTask{&w, x.paired.memory.get() + done * steps, count, rows, to.data + result_bytes(w) * done * to.width,
                                    to.width, std::min(count * rows, x.tokens - done), piece.first, piece.last,
                                    scratch(sparsec::pair_scratch(block_columns(w), count * rows))});
      }
      return;
    }
    case Way::amx: {
      const int64_t across = (x.in + 31) / 32;
      for (int64_t tile = 0; tile < x.tiled.tiles; tile += kTilesAtOnce) {
        const int64_t count = std::min(kTilesAtOnce, x.tiled.tiles - tile), done = 16 * tile;
        char* const memory = reinterpret_cast<char*>(scratch(sparsec::amx_scratch(block_columns(w), count) / 4 + 16));
        isa.amx(AmxTask{&w, x.tiled.data + tile * across * 512, count,
                        to.data + result_bytes(w) * done * to.width, to.width,
                        std::min(16 * count, x.tokens - done), piece.first, piece.last,
                        memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64});
      }
      return;
    }
    case Way::digits: {
      const Digits& d = *x.digits_of(w, isa);
      float* const memory = scratch(sparsec::digit_scratch(d.tiles * d.rows));
      isa.digits(sparsec::DigitTask{&w, d.numbers.get(), d.scale.get(), d.begin.get(), d.before.get(), d.count, d.tiles, d.rows, to.data, to.width, x.tokens,
                                    piece.first, piece.last, memory});
      return;
    }
    default: {
      const bool codes = w.format == sparsec::kCsrInt;
      const sparsec::FormatKernels& kernels = isa.formats[codes ? sparsec::kCsr : w.format];
      (codes ? isa.csr_codes : (part.way == Way::rows ? kernels.rows : kernels.one)[w.codec][w.type])(Task{&w, x.plain, x.paired.memory.get(), to.data, to.width, x.tokens, piece.first, piece.last});
    }
  }
}

// The products of all parts that are shared among threads.
class Products : public Job {
 public:
  // `weights` holds what the parts' matrices point to.
  Products(std::vector<Part> parts, std::shared_ptr<const Cut> cut, Rows x, const std::vector<Tensor>& weights)
      : parts_(std::move(parts)), cut_(std::move(cut)), x_(std::move(x)), weights_(&weights) {}

  int64_t pieces() const override { return static_cast<int64_t>(cut_->pieces.size()); }
  int64_t work(int64_t i) const override { return at(i).work; }
  void here(int64_t i) override { run(of(i), at(i), x_, *cut_->isa, whole(i)); }
  void apart(int64_t i) override {
    const Strip rows(of(i), at(i));
    char* const memory = reinterpret_cast<char*>(scratch<Purpose::result>((x_.tokens * rows.bytes() + 3) / 4));
    // The kernels count rows from the first of the whole matrix.
    run(of(i), at(i), x_, *cut_->isa, Target{reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(memory) - rows.before()), rows.count});
  }
  void hand_over(int64_t i) override {
    const Strip rows(of(i), at(i));
    const Target to = whole(i);
    const char* const memory = reinterpret_cast<const char*>(scratch<Purpose::result>(0));
    for (int64_t t = 0; t < x_.tokens; ++t)
      memcpy(to.data + t * to.width * rows.value + rows.before(), memory + t * rows.bytes(), static_cast<size_t>(rows.bytes()));
  }
  void own() override {
    owned_ = *weights_;
    x_.own();
  }

 private:
  // Output rows of a piece.
  struct Strip {
    Strip(const Part& part, const Piece& piece) : value(result_bytes(part.matrix)) {
      const Matrix& w = part.matrix;
      const int64_t unit = by_panels(part) ? kPanel : w.rows_per_unit;
      first = piece.first * unit;
      count = std::min(piece.last * unit, w.out_features) - first;
    }
    int64_t before() const { return first * value; }
    int64_t bytes() const { return count * value; }
    int64_t value, first, count;
  };

  const Piece& at(int64_t i) const { return cut_->pieces[static_cast<size_t>(i)]; }
  const Part& of(int64_t i) const { return parts_[at(i).part]; }
  Target whole(int64_t i) const { return Target{static_cast<char*>(of(i).out), of(i).matrix.out_features}; }

  const std::vector<Part> parts_;
  const std::shared_ptr<const Cut> cut_;
  Rows x_;
  const std::vector<Tensor>* weights_;
  std::vector<Tensor> owned_;
};

// Every part's `out` is there and not empty; `weights` holds what the matrices point to. cut: made for these parts before, or nothing.
void multiply(std::vector<Part> parts, const Input& x, const std::vector<Tensor>& weights, std::shared_ptr<const Cut> cut = nullptr) {
  const InstructionSet& isa = *chosen.load(std::memory_order_relaxed);
  const int64_t in = parts[0].matrix.in_features, tokens = x.tokens;
  if (!cut || !cut->serves(tokens, isa)) cut = std::make_shared<const Cut>(parts, tokens, isa);
  Rows rows{parts[0].matrix.type, x.data, tokens, in, x.wide, nullptr, {}, {}, {}, {}, {}};
  bool any = false;  // also of no columns, where the bias is left
  for (size_t i = 0; i < parts.size(); ++i) {
    Part& part = parts[i];
    const Matrix& w = part.matrix;
    part.way = cut->ways[i];
    if (part.way == Way::half) {
      by_type(w.type, [&](auto zero) { half_rows<decltype(zero)>(part, x, isa); });
    } else if (part.way == Way::stock) {
      by_type(w.type, [&](auto zero) { stock_rows<decltype(zero)>(part, x); });
    } else {
      rows.prepare(part.way, isa);
      if (part.way == Way::digits) rows.prepare_digits(w, isa);
      any = true;
    }
  }
  if (!any) return;
  const int64_t threads = cut->threads;
  together(std::make_shared<Products>(std::move(parts), std::move(cut), std::move(rows), weights), threads);
}

}  // namespace
