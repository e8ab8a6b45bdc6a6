// A chain: products and the arithmetic between them in one call, for a few rows of x (the program is explained in kernels/chain.py).
#pragma once
#include "arguments.h"
#include "products.h"

namespace {

using sparsec::Operand;

// Memory of one thread that stays from call to call, for everything that a chain computes on its way.
class Arena {
 public:
  void reset() { chunk_ = used_ = 0; }
  float* take(int64_t floats) {
    floats = (floats + sparsec::kSpare + 15) / 16 * 16;
    while (chunk_ < chunks_.size() && used_ + floats > chunks_[chunk_].floats) {
      ++chunk_;
      used_ = 0;
    }
    if (chunk_ == chunks_.size()) {
      const int64_t size = std::max<int64_t>(floats, 1 << 16);
      Chunk chunk{std::unique_ptr<float[]>(new float[size + 16]()), nullptr, size};
      chunk.start = chunk.memory.get() + (64 - reinterpret_cast<uintptr_t>(chunk.memory.get()) % 64) % 64 / sizeof(float);
      chunks_.push_back(std::move(chunk));
    }
    float* const found = chunks_[chunk_].start + used_;
    used_ += floats;
    return found;
  }

 private:
  struct Chunk {
    std::unique_ptr<float[]> memory;
    float* start;  // at a multiple of 64 bytes
    int64_t floats;
  };
  std::vector<Chunk> chunks_;
  size_t chunk_ = 0;
  int64_t used_ = 0;
};

// A value of the chain, in fp32 and rounded to its type: [rows][width], or the same row for all.
struct Register {
  const float* data;
  int64_t width;
  bool one_row;
  ValueType type;
};

class Chain {
 public:
  Chain(const char* op, int64_t rows, const std::vector<double>& constants)
      : op_(op), isa_(*chosen.load(std::memory_order_relaxed)), rows_(rows) {
    arena().reset();
    float* const memory = arena().take(static_cast<int64_t>(constants.size()));
    for (size_t i = 0; i < constants.size(); ++i) memory[i] = static_cast<float>(constants[i]);
    constants_ = memory;
    constant_count_ = static_cast<int64_t>(constants.size());
  }

  void input(Tensor t) {
    STD_TORCH_CHECK(t.is_cpu(), op_, ": inputs and packed weights must be on one device");
    const ValueType type = value_type(op_, t.scalar_type());
    STD_TORCH_CHECK(type != sparsec::kFloat64, op_, ": inputs must be float32, bfloat16 or float16");
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
    const int64_t width = t.dim() ? t.size(t.dim() - 1) : 1, count = t.numel();
    STD_TORCH_CHECK(count == width || count == rows_ * width, op_, ": an input must have 1 or ", rows_, " rows of ", width,
                    " numbers, got ", count, " numbers");
    float* const data = arena().take(count);
    isa_.widen[type](t.const_data_ptr(), data, count);
    registers_.push_back({data, width, count == width && rows_ != 1, type});
  }

  void run(const std::vector<int64_t>& program, const std::vector<Tensor>& tensors) {
    size_t used = 0;
    const size_t end = program.size();
    for (size_t at = 0; at < end;) {
      STD_TORCH_CHECK(at + 4 <= end, op_, ": the program ends early, at entry ", at);
      const int64_t* const entry = program.data() + at;
      at += 4;
      if (entry[0] == 0) {
        STD_TORCH_CHECK(entry[3] >= 0 && static_cast<size_t>(entry[3]) <= end - at, op_, ": the program ends early, at entry ", at);
        const size_t before = used;
        product(entry[1], entry + 4, static_cast<size_t>(entry[3]), tensors, used);
        STD_TORCH_CHECK(static_cast<int64_t>(used - before) == entry[2], op_, ": a product's layout names ", used - before,
                        " tensors, the program ", entry[2]);
        at += static_cast<size_t>(entry[3]);
      } else {
        STD_TORCH_CHECK(entry[0] > 0 && entry[0] < sparsec::kElementOps && entry[1] >= 0 && entry[1] < sparsec::kFloat64, op_,
                        ": the program names no instruction at entry ", at - 4);
        element(static_cast<sparsec::ElementOp>(entry[0]), static_cast<ValueType>(entry[1]), entry[2], entry[3]);
      }
    }
    STD_TORCH_CHECK(used == tensors.size(), op_, ": the program uses ", used, " tensors, got ", tensors.size());
  }

  // Of register results[0], the results[1] sizes that follow; and so on.
  std::vector<Tensor> results(const std::vector<int64_t>& results) {
    std::vector<Tensor> found;
    for (size_t at = 0; at < results.size();) {
      const bool whole = at + 2 <= results.size() && results[at + 1] >= 0 && static_cast<size_t>(results[at + 1]) <= results.size() - at - 2;
      STD_TORCH_CHECK(whole, op_, ": the results end early, at entry ", at);
      const Register& from = find(results[at]);
      const auto sizes = results.begin() + static_cast<int64_t>(at) + 2;
      at += 2 + static_cast<size_t>(results[at + 1]);
      const std::vector<int64_t> shape(sizes, results.begin() + static_cast<int64_t>(at));
      int64_t count = 1;
      for (int64_t size : shape) {
        STD_TORCH_CHECK(size >= 0, op_, ": sizes of a result must not be negative, got ", size);
        count *= size;
      }
      STD_TORCH_CHECK(!from.one_row && count == rows_ * from.width, op_, ": a result has ", rows_ * from.width, " numbers, not ", count);
      found.push_back(empty(kDtypes[from.type](), shape));
      isa_.narrow[from.type](from.data, found.back().mutable_data_ptr(), count);
    }
    return found;
  }

 private:
  static constexpr int32_t (*kDtypes[])() = {aoti_torch_dtype_float32, aoti_torch_dtype_bfloat16, aoti_torch_dtype_float16};

  static Arena& arena() {
    thread_local Arena memory;
    return memory;
  }

  const Register& find(int64_t i) const {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(registers_.size()), op_, ": there are ", registers_.size(),
                    " registers by then, the program names ", i);
    return registers_[static_cast<size_t>(i)];
  }

  void product(int64_t x_at, const int64_t* layout, size_t length, const std::vector<Tensor>& tensors, size_t& used) {
    matrices_.clear();
    read_parts(op_, tensors, used, layout, length, matrices_);
    const Register x = find(x_at);
    std::vector<Part> parts;
    for (size_t i = 0; i < matrices_.size(); ++i) {
      const Matrix& w = matrices_[i];
      STD_TORCH_CHECK(w.type == x.type && w.in_features == x.width && !x.one_row, op_,
                      ": x of a product must have the dtype of the weights and rows of in_features=", w.in_features, " numbers, got ",
                      x.width);
      float* const data = arena().take(rows_ * w.out_features);
      registers_.push_back({data, w.out_features, false, x.type});
      if (rows_ && w.out_features)
        parts.push_back(Part{w, x.type == sparsec::kFloat32 ? data : static_cast<void*>(arena().take(rows_ * w.out_features))});
    }
    if (parts.empty()) return;
    const int64_t count = rows_ * x.width;
    const void* data = x.data;
    if (x.type != sparsec::kFloat32) {
      float* const halves = arena().take(count);
      isa_.narrow[x.type](x.data, halves, count);
      data = halves;
    }
    multiply(parts, Input{data, x.data, rows_, kDtypes[x.type]()}, tensors);
    if (x.type == sparsec::kFloat32) return;
    size_t part = 0;
    for (size_t i = registers_.size() - matrices_.size(); i < registers_.size(); ++i)
      if (const int64_t numbers = rows_ * registers_[i].width)
        isa_.widen[x.type](parts[part++].out, const_cast<float*>(registers_[i].data), numbers);
  }

  Operand operand(int64_t i) const {
    if (i < 0) {
      STD_TORCH_CHECK(-1 - i < constant_count_, op_, ": there are ", constant_count_, " constants, the program names ", -1 - i);
      return Operand{constants_ + (-1 - i), 1, 0, true};
    }
    const Register& r = find(i);
    return Operand{r.data, r.width, r.one_row ? 0 : r.width, r.width == 1};
  }

  void element(sparsec::ElementOp op, ValueType type, int64_t a_at, int64_t b_at) {
    const Operand a = operand(a_at), b = operand(b_at);
    const bool reduces = op == sparsec::kMean || op == sparsec::kVariance;
    const int64_t width = reduces ? 1 : a.one ? b.width : a.width;
    STD_TORCH_CHECK(reduces || a.one || b.one || a.width == b.width, op_, ": rows of ", a.width, " and of ", b.width,
                    " numbers do not go together");
    float* const out = arena().take(rows_ * width);
    isa_.elementwise(sparsec::ElementTask{op, type, a, b, out, rows_, width});
    registers_.push_back({out, width, false, type});
  }

  const char* op_;
  const sparsec::InstructionSet& isa_;
  int64_t rows_;
  const float* constants_;
  int64_t constant_count_;
  std::vector<Register> registers_;
  std::vector<Matrix> matrices_;
};

std::vector<Tensor> chain(std::vector<Tensor> inputs, std::vector<Tensor> tensors, int64_t rows, std::vector<int64_t> program,
                          std::vector<double> constants, std::vector<int64_t> results) {
  const char* op = "chain";
  STD_TORCH_CHECK(rows >= 0, op, ": rows must not be negative, got ", rows);
  Chain computed(op, rows, constants);
  for (Tensor& t : inputs) computed.input(std::move(t));
  computed.run(program, tensors);
  return computed.results(results);
}

}  // namespace
