// A program: products, what stands between them, and attention over a cache, prepared once and run in one call (kernels/program.py
// explains the instructions). It holds tensors and numbers only.
#pragma once
#include "run.h"

namespace {

using sparsec::ElementOp;
using sparsec::kInstructions, sparsec::kView, sparsec::kTensor, sparsec::kJoin, sparsec::kLookUp;

class Program {
 public:
  // inputs: what each call will give.
  Program(const char* op, std::vector<Tensor> tensors, const std::vector<double>& constants, std::vector<Value> inputs,
          const std::vector<int64_t>& code)
      : op_(op) {
    made_.op = op;
    made_.tensors = std::move(tensors);
    made_.constants.assign(constants.begin(), constants.end());
    made_.inputs = inputs.size();
    for (const Tensor& t : made_.tensors) memory_.push_back(t.const_data_ptr());
    made_.constants.resize(constants.size() + sparsec::kSpare);
    for (Value& v : inputs) define(v);
    parse(code);
    STD_TORCH_CHECK(used_ == made_.tensors.size(), op_, ": the program uses ", used_, " tensors, got ", made_.tensors.size());
  }

  // The value that register i holds at the end; none after it needs be kept before.
  const Value& keep(int64_t i) {
    const Value& found = find(i);
    made_.buffers[found.buffer].last = made_.steps.size();
    return found;
  }
  void plan() { made_.floats = place(made_.buffers); }

  // Whether the tensors still are where they were; `x.data = y` moves them.
  bool moved() const {
    for (size_t i = 0; i < made_.tensors.size(); ++i)
      if (made_.tensors[i].const_data_ptr() != memory_[i]) return true;
    return false;
  }
  size_t steps() const { return made_.steps.size(); }
  size_t caches() const { return made_.caches.size(); }

  // Attention is for the sequences of a program; a chain, which has none, has no caches either.
  void check_batch(int64_t batch) const {
    for (const Step& step : made_.steps) {
      if (step.kind != Kind::attend) continue;
      const Value& q = made_.values[static_cast<size_t>(step.from[0])];
      const AttendStep& how = made_.attends[step.item];
      STD_TORCH_CHECK(batch > 0, op_, ": there is no cache to attend to");
      STD_TORCH_CHECK(q.numel() == batch * how.heads * how.width, op_, ": attention has ", q.numel() / (how.heads * how.width),
                      " sequences, the program ", batch);
    }
  }

  // Of keys (an even number) or values, of which positions [first, last) are there, and room must be for one more.
  void check_slab(size_t i, const Tensor& slab, int64_t batch, int64_t first, int64_t last) const {
    const Cache& cache = made_.caches[i / 2];
    const int64_t width = i % 2 ? cache.value_width : cache.width;
    STD_TORCH_CHECK(slab.is_cpu() && slab.dim() == 4 && slab.size(0) == batch && slab.size(1) == cache.shared && 0 <= first && first <= last &&
                        last < slab.size(2) && slab.size(3) == width && slab.stride(3) == 1 && slab.scalar_type() == kScalarTypes[cache.type],
                    op_, ": cache ", i / 2, " does not fit the model: wanted [", batch, ", ", cache.shared, ", more than ", last, ", ", width,
                    "] of its dtype");
  }

  Run run(const Call& call) const { return Run(made_, call); }

 private:

  // A register's value, which the step that comes next reads.
  const Value& find(int64_t i) {
    STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(made_.values.size()), op_, ": there are ", made_.values.size(),
                    " registers by then, the program names ", i);
    const Value& found = made_.values[static_cast<size_t>(i)];
    made_.buffers[found.buffer].last = made_.steps.size();
    return found;
  }
  // Negative: a constant.
  int64_t operand_at(int64_t i) {
    if (i >= 0) return static_cast<void>(find(i)), i;
    const int64_t count = static_cast<int64_t>(made_.constants.size()) - sparsec::kSpare;
    STD_TORCH_CHECK(-1 - i < count, op_, ": there are ", count, " constants, the program names ", -1 - i);
    if (made_.fixed.empty())
      for (int64_t c = 0; c < count; ++c) made_.fixed.push_back(Value{kFixed, c, {1, 1, 1}, {0, 0, 1}, sparsec::kFloat32});
    return i;
  }

  // A value of its own memory.
  size_t define(Value v) {
    check_size(v);
    v.buffer = made_.buffers.size();
    v.offset = 0;
    made_.buffers.push_back(Buffer{v.numel(), 0, made_.steps.size(), made_.steps.size()});
    made_.values.push_back(v);
    return made_.values.size() - 1;
  }
  // So that no product of sizes and strides overflows, and no call takes more memory than there may be.
  void check_size(const Value& v) const {
    int64_t room = kMost;
    for (const int64_t size : v.size) {
      STD_TORCH_CHECK(size <= room, op_, ": a register has more than ", kMost, " numbers");
      if (size > 0) room /= size;
    }
  }
  // Memory that one step needs.
  Value aside(int64_t numbers, ValueType type) {
    made_.buffers.push_back(Buffer{numbers, 0, made_.steps.size(), made_.steps.size()});
    return Value{made_.buffers.size() - 1, 0, {1, 1, numbers}, {numbers, numbers, 1}, type};
  }

  const Tensor& next_tensor(int64_t at) {
    STD_TORCH_CHECK(used_ < made_.tensors.size(), op_, ": the program names more tensors than the ", made_.tensors.size(), " given, at entry ", at);
    const Tensor& t = made_.tensors[used_++];
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), op_, ": tensors must be contiguous and on the CPU");
    return t;
  }

  void parse(const std::vector<int64_t>& code) {
    for (size_t at = 0; at < code.size();) {
      const int64_t* entry = code.data() + at;
      const int64_t place = static_cast<int64_t>(at);
      const auto take = [&](size_t count) {
        STD_TORCH_CHECK(count <= code.size() - at, op_, ": the program ends early, at entry ", place);
        at += count;
      };
      take(1);
      const int64_t which = entry[0];
      STD_TORCH_CHECK(which >= 0 && which < kInstructions, op_, ": the program names no instruction at entry ", place);
      if (which == 0) {
        take(3);
        STD_TORCH_CHECK(entry[3] >= 0, op_, ": the program ends early, at entry ", place);
        take(static_cast<size_t>(entry[3]));
        product(entry);
      } else if (which < sparsec::kElementOps) {
        take(3);
        element(entry, place);
      } else if (which == kView) {
        take(8);
        view(entry);
      } else if (which == kTensor) {
        const size_t item = used_;
        const Tensor& t = next_tensor(place);
        made_.steps.push_back(Step{Kind::tensor, {}, define(Value::row(t.numel(), half_type(t.scalar_type()))), {}, item});
      } else if (which == kJoin) {
        take(1);
        STD_TORCH_CHECK(entry[1] > 0, op_, ": nothing is joined at entry ", place);
        take(static_cast<size_t>(entry[1]));
        join(entry);
      } else if (which == kLookUp) {
        take(3);
        STD_TORCH_CHECK(entry[3] >= 0, op_, ": the program ends early, at entry ", place);
        take(static_cast<size_t>(entry[3]));
        look_up(entry, place);
      } else {
        take(11);
        attend(entry, place);
      }
    }
  }

  ValueType half_type(ScalarType scalar) const {
    const ValueType type = value_type(op_, scalar);
    STD_TORCH_CHECK(type != sparsec::kFloat64, op_, ": inputs must be float32, bfloat16 or float16");
    return type;
  }

  void product(const int64_t* entry) {
    ProductStep p;
    const size_t before = used_;
    std::vector<Matrix> matrices;
    read_parts(op_, made_.tensors, used_, entry + 4, static_cast<size_t>(entry[3]), matrices);
    STD_TORCH_CHECK(static_cast<int64_t>(used_ - before) == entry[2], op_, ": a product's layout names ", used_ - before,
                    " tensors, the program ", entry[2]);
    STD_TORCH_CHECK(!matrices.empty(), op_, ": a product's layout is empty");
    p.tensors.assign(made_.tensors.begin() + static_cast<int64_t>(before), made_.tensors.begin() + static_cast<int64_t>(used_));
    const Value x = find(entry[1]);
    const bool half = x.type != sparsec::kFloat32;
    const int64_t in = matrices[0].in_features, rows = in ? x.numel() / in : x.size[0] * x.size[1];
    if (half) p.halves = aside(x.numel(), x.type);
    size_t out = made_.values.size();
    for (size_t i = 0; i < matrices.size(); ++i) {
      const Matrix& w = matrices[i];
      STD_TORCH_CHECK(w.type == x.type && w.in_features == in && (in ? x.size[2] == in : !x.numel()) && x.contiguous(), op_,
                      ": x of a product must have the dtype of the weights and rows of in_features=", w.in_features, " numbers, got ",
                      x.size[2]);
      define(Value::rows(rows, w.out_features, x.type));
      if (!w.out_features) continue;
      if (half) p.results.push_back(aside(rows * w.out_features, x.type));
      p.parts.push_back(Part{w});
      p.numbers.push_back(i);
    }
    p.cut = std::make_shared<const Cut>(p.parts, rows, *chosen.load(std::memory_order_relaxed));
    made_.products.push_back(std::move(p));
    made_.steps.push_back(Step{Kind::product, {}, out, {entry[1]}, made_.products.size() - 1});
  }

  void element(const int64_t* entry, int64_t place) {
    STD_TORCH_CHECK(entry[1] >= 0 && entry[1] < sparsec::kFloat64, op_, ": the program names no instruction at entry ", place);
    const ElementOp op = static_cast<ElementOp>(entry[0]);
    const int64_t at_a = operand_at(entry[2]), at_b = operand_at(entry[3]);
    const Value &a = made_.operand(at_a), &b = made_.operand(at_b);
    Value out{0, 0, {}, {}, static_cast<ValueType>(entry[1])};
    for (int d = 0; d < 3; ++d) {
      STD_TORCH_CHECK(a.size[d] == b.size[d] || a.size[d] == 1 || b.size[d] == 1, op_, ": rows of ", a.size[2], " and of ", b.size[2],
                      " numbers do not go together");
      out.size[d] = a.size[d] == 1 ? b.size[d] : a.size[d];
    }
    STD_TORCH_CHECK(a.dense_rows() && b.dense_rows(), op_, ": the numbers of a row must lie side by side");
    if (op == sparsec::kMean || op == sparsec::kVariance) out.size[2] = 1;
    out.pack();
    made_.steps.push_back(Step{Kind::element, op, define(out), {at_a, at_b}, 0});
  }

  void view(const int64_t* entry) {
    Value v = find(entry[1]);
    const int64_t offset = entry[2], room = made_.buffers[v.buffer].floats;
    int64_t last = v.offset + offset;
    for (int d = 0; d < 3; ++d) {
      v.size[d] = entry[3 + d];
      v.stride[d] = entry[6 + d];
      STD_TORCH_CHECK(v.size[d] > 0 && v.stride[d] >= 0 && v.stride[d] <= kMost && offset >= 0 && offset <= kMost, op_,
                      ": a view must have sizes above 0, and an offset and strides from 0 to ", kMost);
      STD_TORCH_CHECK(v.size[d] <= kMost, op_, ": a register has more than ", kMost, " numbers");
      last += (v.size[d] - 1) * v.stride[d];
    }
    check_size(v);
    v.offset += offset;
    STD_TORCH_CHECK(last < room, op_, ": a view ends at number ", last, " of ", room);
    made_.values.push_back(v);
  }

  void join(const int64_t* entry) {
    Value out = find(entry[2]);
    std::vector<int64_t> from;
    out.size[2] = 0;
    for (int64_t i = 0; i < entry[1]; ++i) {
      const Value& v = find(entry[2 + i]);
      STD_TORCH_CHECK(v.size[0] == out.size[0] && v.size[1] == out.size[1] && v.type == out.type, op_, ": what is joined must have as many rows, and one dtype");
      out.size[2] += v.size[2];
      from.push_back(entry[2 + i]);
    }
    out.pack();
    made_.steps.push_back(Step{Kind::join, {}, define(out), std::move(from), 0});
  }

  void look_up(const int64_t* entry, int64_t place) {
    const Value& index = find(entry[1]);
    const int64_t count = index.numel();
    STD_TORCH_CHECK(index.contiguous(), op_, ": ids must lie side by side");
    std::vector<Matrix> found;
    const size_t before = used_;
    read_parts(op_, made_.tensors, used_, entry + 4, static_cast<size_t>(entry[3]), found);
    STD_TORCH_CHECK(found.size() == 1 && static_cast<int64_t>(used_ - before) == entry[2], op_, ": a table is one matrix, at entry ", place);
    STD_TORCH_CHECK(has_rows(found[0]), op_, ": a table of this format has no rows to look up, at entry ", place);
    made_.tables.push_back(found[0]);
    made_.steps.push_back(Step{Kind::look_up, {}, define(Value::rows(count, found[0].in_features, found[0].type)), {entry[1]}, made_.tables.size() - 1});
  }

  void attend(const int64_t* entry, int64_t place) {
    const AttendStep how{entry[4], entry[5], entry[6], entry[7], entry[8], constant(entry[9]), constant(entry[10]), entry[11]};
    const Value &q = find(entry[1]), &k = find(entry[2]), &v = find(entry[3]);
    const int64_t batch = how.heads * how.width > 0 ? q.numel() / (how.heads * how.width) : 0;
    STD_TORCH_CHECK(how.layer >= 0 && how.layer < kLayers && how.shared > 0 && how.heads % how.shared == 0 && batch > 0 &&
                        q.numel() == batch * how.heads * how.width && k.numel() == batch * how.shared * how.width &&
                        v.numel() == batch * how.shared * how.value_width && q.contiguous() && k.contiguous() && v.contiguous() &&
                        q.type == k.type && q.type == v.type && how.window >= 0,
                    op_, ": attention's heads do not go together, at entry ", place);
    for (const AttendStep& other : made_.attends)
      STD_TORCH_CHECK(other.layer != how.layer, op_, ": layer ", how.layer, " attends twice, at entry ", place);
    if (made_.caches.size() <= static_cast<size_t>(how.layer)) made_.caches.resize(static_cast<size_t>(how.layer) + 1);
    made_.caches[static_cast<size_t>(how.layer)] = Cache{how.shared, how.width, how.value_width, q.type};
    const size_t out = define(Value::rows(batch, how.heads * how.value_width, q.type));
    made_.attends.push_back(how);
    made_.steps.push_back(Step{Kind::attend, {}, out, {entry[1], entry[2], entry[3]}, made_.attends.size() - 1});
  }

  float constant(int64_t i) {
    STD_TORCH_CHECK(i < 0, op_, ": a scale must be a constant, the program names register ", i);
    return made_.constants[static_cast<size_t>(made_.operand(operand_at(i)).offset)];
  }

  static constexpr int64_t kLayers = 1 << 16, kMost = int64_t{1} << 30;

  const char* op_;
  size_t used_ = 0;  // tensors
  std::vector<const void*> memory_;
  Prepared made_;
};

}  // namespace
