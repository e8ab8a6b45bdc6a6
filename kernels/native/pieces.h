// Matrices that are multiplied with the same x, cut into pieces of work for several threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "formats.h"

namespace {

constexpr int64_t kBytesPerThread = 1 << 16;  // of a matrix, worth waking a thread for: some 5 us
constexpr int64_t kLeastPiece = 1 << 16;      // bytes worth asking for: some 5 us

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

// Units [first, last) of one part.
struct Piece {
  size_t part;
  int64_t first;
  int64_t last;
  int64_t work;  // as work_of() counts it
};

int64_t work_of(const Part& part, int64_t tokens) {
  return bytes_of(part.matrix).before(part.matrix.units) * std::max<int64_t>(1, tokens / 4);
}

// The unit is then a panel of 16 rows, whatever rows_per_unit is.
bool by_panels(const Part& part) {
  return part.way == Way::panels || part.way == Way::pairs || part.way == Way::amx || (part.way == Way::digits && part.matrix.format == sparsec::kBsrInt);
}

// Whether a product is cut into pieces for our threads; else torch's own dense product has part in it.
bool is_shared(Way way) { return way != Way::half && way != Way::stock; }

// Pieces that shrink: `threads` of them take three quarters of the work, as many three quarters of the rest, and so on. A thread that
// comes late, or whose CPU is taken away, leaves more of them to the others, and all end together ("factoring": Hummel, Schonberg and
// Flynn, "Factoring: a method for scheduling parallel loops", Communications of the ACM 35(8), 1992). Pieces of equal size were 1.15
// times as slow on 576x1536, 1.4 times where there were three of them for two threads.
std::vector<Piece> split(const std::vector<Part>& parts, int64_t tokens, int64_t threads) {
  std::vector<Piece> pieces;
  int64_t rest = 0;
  for (const Part& part : parts)
    if (is_shared(part.way)) rest += work_of(part, tokens);
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
  for (size_t p = 0; p < parts.size(); ++p) {
    const Part& part = parts[p];
    if (!is_shared(part.way)) continue;
    const Matrix& w = part.matrix;
    const bool panels = by_panels(part);
    const int64_t units = panels ? (w.out_features + kPanel - 1) / kPanel : w.units;
    const Bytes bytes = bytes_of(w);
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
      const int64_t taken = before(last) - start;
      pieces.push_back(Piece{p, first, last, taken});
      rest -= taken;
      left -= taken;
      if (left <= 0) next_piece();
      first = last;
    }
  }
  return pieces;
}

// How a product of some parts is done: chosen once where it is done again and again, since where rows begin has left all caches by then.
struct Cut {
  Cut(std::vector<Part>& parts, int64_t rows, const InstructionSet& set) : isa(&set), tokens(rows), available(Team::available()) {
    int64_t work = 0;
    for (Part& part : parts) {
      part.way = way_of(part.matrix, tokens, set);
      ways.push_back(part.way);
      if (is_shared(part.way)) work += work_of(part, tokens);
    }
    threads = std::max<int64_t>(1, std::min<int64_t>(available, work / kBytesPerThread));
    pieces = split(parts, tokens, threads);
  }

  bool serves(int64_t rows, const InstructionSet& set) const {
    return isa == &set && tokens == rows && available == Team::available();
  }

  const InstructionSet* isa;
  int64_t tokens, available;
  std::vector<Way> ways;  // of the parts
  std::vector<Piece> pieces;
  int64_t threads;  // that it is worth
};

// Memory of one thread that grows and stays, for one purpose: fresh pages at every call would cost more than small products.
enum class Purpose { decoding, result };
template <Purpose = Purpose::decoding>
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(static_cast<size_t>(floats));
  return memory.data();
}

}  // namespace
