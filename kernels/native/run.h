// One run of a program: what each of its steps does.
#pragma once
#include "decode_attention.h"
#include "memory_plan.h"
#include "table_rows.h"

namespace {

using sparsec::Operand;

// Matrices that are multiplied with the same rows.
struct ProductStep {
  std::vector<Part> parts;      // matrices that have rows
  std::vector<size_t> numbers;  // of these among the results
  std::shared_ptr<const Cut> cut;
  std::vector<Tensor> tensors;  // that they point to
  Value halves;                 // x in the type of the matrices, and the parts' results; of fp32 not used
  std::vector<Value> results;
};
struct AttendStep {
  int64_t layer, heads, shared, width, value_width;
  float scale, cap;
  int64_t window;  // positions that it sees at most; 0: all
};
// Of a layer.
struct Cache {
  int64_t shared, width, value_width;
  ValueType type;
};

constexpr int64_t kTeamTokens = 16;  // of a run whose threads stay for all of its steps

// A program as it is run: see Program, which makes it.
struct Prepared {
  // How many are worth waking for its largest product.
  int64_t threads() const {
    int64_t most = 1;
    for (const ProductStep& p : products) most = std::max(most, p.cut->threads);
    return most;
  }

  const Value& operand(int64_t i) const { return i < 0 ? fixed[static_cast<size_t>(-1 - i)] : values[static_cast<size_t>(i)]; }

  const char* op;
  std::vector<Tensor> tensors;
  std::vector<float> constants;
  std::vector<Value> fixed;  // the constants' values
  size_t inputs;             // the first values are those of the inputs
  std::vector<Value> values;
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::vector<ProductStep> products;
  std::vector<Matrix> tables;
  std::vector<AttendStep> attends;
  std::vector<Cache> caches;  // by layer
  int64_t floats = 0;         // of memory
};

// What a call gives: the tensors of its inputs, and, for attention, the caches.
struct Call {
  std::vector<Tensor> inputs;
  const float* mask = nullptr;                  // [batch][positions], added to the scores
  int64_t positions = 0;                        // of the mask
  const std::vector<Tensor>* slabs = nullptr;   // keys and values of each layer [batch][shared][room][width]
  const std::vector<int64_t>* spans = nullptr;  // of each layer the positions [first, last) that are there
  int64_t* times = nullptr;                     // of each step, in ns, added to
};

// One run of a program. Its values stay until this thread runs another.
class Run {
 public:
  static constexpr int32_t (*kDtypes[])() = {aoti_torch_dtype_float32, aoti_torch_dtype_bfloat16, aoti_torch_dtype_float16};

  Run(const Prepared& program, const Call& call)
      : program_(program), isa_(*chosen.load(std::memory_order_relaxed)), memory_(arena(program.floats)), call_(call) {
    for (size_t i = 0; i < program.inputs; ++i) {
      const Value& v = program.values[i];
      Tensor t = call.inputs[i];
      if (!t.is_contiguous()) t = torch::stable::contiguous(t);
      isa_.widen[v.type](t.const_data_ptr(), at(v), v.numel());
    }
    const int64_t threads = program.threads();
    if (threads > 1 && !without_torch() && in_pieces())
      lead(threads);
    else
      steps();
  }

  float* at(const Value& v) const {
    return v.buffer == kFixed ? const_cast<float*>(program_.constants.data()) + v.offset : memory_ + program_.buffers[v.buffer].place + v.offset;
  }
  // Numbers of a value, in its type.
  void give(const Value& v, void* to, int64_t count) const { isa_.narrow[v.type](at(v), to, count); }

 private:
  void lead(int64_t threads) const {
    const int64_t start = nanoseconds(), idle = Team::gather(threads, [this] { steps(); }), end = nanoseconds();
    lateness().saw(end, idle - start, end - idle);
  }
  void steps() const {
    for (size_t i = 0; i < program_.steps.size(); ++i) {
      const int64_t start = call_.times ? nanoseconds() : 0;
      take(program_.steps[i]);
      if (call_.times) call_.times[i] += nanoseconds() - start;
    }
  }

  // Whether all products are of few rows, and cut into pieces: what torch computes with its own threads must not lie within a region.
  bool in_pieces() const {
    for (const ProductStep& p : program_.products) {
      if (p.cut->tokens > kTeamTokens || !p.cut->serves(p.cut->tokens, isa_)) return false;
      for (const Way way : p.cut->ways)
        if (!is_shared(way)) return false;
    }
    return true;
  }

  const Value& value(int64_t i) const { return program_.values[static_cast<size_t>(i)]; }

  void take(const Step& step) const {
    switch (step.kind) {
      case Kind::element: return element(step);
      case Kind::product: return product(step);
      case Kind::tensor: {
        const Value& out = value(step.out);
        return isa_.widen[out.type](program_.tensors[step.item].const_data_ptr(), at(out), out.numel());
      }
      case Kind::join: return join(step);
      case Kind::look_up: return look_up(step);
      case Kind::attend: return attend(step);
    }
  }

  void element(const Step& step) const {
    const Value &a = program_.operand(step.from[0]), &b = program_.operand(step.from[1]), &out = value(step.out);
    const float *from_a = at(a), *from_b = at(b);
    float* to = at(out);
    const auto operand = [](const float* from, const Value& v) {
      return Operand{from, v.size[2], v.size[1] == 1 ? 0 : v.stride[1], v.size[2] == 1 || v.stride[2] == 0};
    };
    for (int64_t o = 0; o < out.size[0]; ++o, to += out.stride[0])
      isa_.elementwise(sparsec::ElementTask{step.op, out.type, operand(from_a + (a.size[0] == 1 ? 0 : o * a.stride[0]), a),
                                           operand(from_b + (b.size[0] == 1 ? 0 : o * b.stride[0]), b), to, out.size[1], out.size[2]});
  }

  void product(const Step& step) const {
    const ProductStep& p = program_.products[step.item];
    const Value& x = value(step.from[0]);
    const int64_t tokens = p.cut->tokens;
    const bool half = x.type != sparsec::kFloat32;
    float* const wide = at(x);
    float* const halves = half ? at(p.halves) : wide;
    if (half) isa_.narrow[x.type](wide, halves, x.numel());
    if (!tokens || p.parts.empty()) return;
    std::vector<Part> parts = p.parts;
    for (size_t i = 0; i < parts.size(); ++i) parts[i].out = half ? at(p.results[i]) : at(value(step.out + p.numbers[i]));
    multiply(std::move(parts), Input{halves, wide, tokens, kDtypes[x.type]()}, p.tensors, p.cut);
    if (!half) return;
    for (size_t i = 0; i < p.parts.size(); ++i) {
      const Value& out = value(step.out + p.numbers[i]);
      isa_.widen[x.type](at(p.results[i]), at(out), out.numel());
    }
  }

  void join(const Step& step) const {
    const Value& out = value(step.out);
    float* to = at(out);
    for (const size_t i : step.from) {
      const Value& v = value(i);
      const float* const from = at(v);
      for (int64_t o = 0; o < out.size[0]; ++o)
        for (int64_t r = 0; r < out.size[1]; ++r) {
          const float* const row = from + o * v.stride[0] + r * v.stride[1];
          float* const place = to + o * out.stride[0] + r * out.stride[1];
          if (v.stride[2] == 1)
            std::copy_n(row, v.size[2], place);
          else
            for (int64_t k = 0; k < v.size[2]; ++k) place[k] = row[k * v.stride[2]];
        }
      to += v.size[2];
    }
  }

  void look_up(const Step& step) const {
    const Matrix& table = program_.tables[step.item];
    const Value &index = value(step.from[0]), &out = value(step.out);
    const float* const from = at(index);
    for (int64_t i = 0; i < out.size[1]; ++i) {
      const int64_t row = static_cast<int64_t>(from[i]);
      STD_TORCH_CHECK(row >= 0 && row < table.out_features, program_.op, ": ids must lie from 0 to ", table.out_features - 1,
                      ", the last row of the table, got ", row);
      table_row(table, row, at(out) + i * out.size[2]);
    }
    if (out.type == sparsec::kFloat32 || table.format < sparsec::kFormats) return;  // else they are rounded already
    const float most = out.type == sparsec::kBFloat16 ? 3.3895314e38f : 65504.0f;
    for (float *v = at(out), *const end = v + out.numel(); v < end; ++v) *v = *v > most ? most : *v < -most ? -most : *v;
    round(out);
  }

  void attend(const Step& step) const {
    const AttendStep& how = program_.attends[step.item];
    const Value& q = value(step.from[0]);
    const size_t layer = static_cast<size_t>(how.layer);
    const Tensor &k = (*call_.slabs)[2 * layer], &v = (*call_.slabs)[2 * layer + 1];
    const int64_t end = (*call_.spans)[2 * layer + 1], batch = k.size(0);
    append(at(value(step.from[1])), k, q.type, end, how.width);
    append(at(value(step.from[2])), v, q.type, end, how.value_width);
    int64_t first = (*call_.spans)[2 * layer];
    if (how.window) first = std::max(first, end + 1 - how.window);
    Mask seen;
    if (call_.mask) {  // of which the last is the new position
      seen.widened.reset(new float[static_cast<size_t>(batch * (end + 1))]);
      for (int64_t b = 0; b < batch; ++b)
        std::copy_n(call_.mask + (b + 1) * call_.positions - (end + 1 - first), end + 1 - first, seen.widened.get() + b * (end + 1) + first);
      seen.data = seen.widened.get();
      seen.batch_stride = end + 1;
    }
    const Value& out = value(step.out);
    Attention::run(Query{at(q), k, v, q.type, batch, how.heads, first, end + 1, how.scale, how.cap}, std::move(seen), isa_)->merge(at(out));
    if (out.type != sparsec::kFloat32) round(out);
  }

  void append(const float* from, const Tensor& slab, ValueType type, int64_t position, int64_t width) const {
    char* const data = static_cast<char*>(slab.mutable_data_ptr());
    const int64_t bytes = type == sparsec::kFloat32 ? 4 : 2;
    for (int64_t b = 0; b < slab.size(0); ++b)
      for (int64_t h = 0; h < slab.size(1); ++h, from += width)
        isa_.narrow[type](from, data + bytes * (b * slab.stride(0) + h * slab.stride(1) + position * slab.stride(2)), width);
  }

  void round(const Value& v) const {
    const Operand all{at(v), v.numel(), 0, false};
    isa_.elementwise(sparsec::ElementTask{sparsec::kCopy, v.type, all, all, at(v), 1, v.numel()});
  }

  const Prepared& program_;
  const InstructionSet& isa_;
  float* const memory_;
  const Call& call_;
};

}  // namespace
