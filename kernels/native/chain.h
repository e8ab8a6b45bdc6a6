// A chain: a program that is run once, for a few rows of x (kernels/chain.py).
#pragma once
#include "program.h"

namespace {

// Of register results[0], the results[1] sizes that follow; and so on.
std::vector<Tensor> chain(std::vector<Tensor> inputs, std::vector<Tensor> tensors, int64_t rows, std::vector<int64_t> code,
                          std::vector<double> constants, std::vector<int64_t> results) {
  const char* op = "chain";
  STD_TORCH_CHECK(rows >= 0, op, ": rows must not be negative, got ", rows);
  std::vector<Value> given;
  for (const Tensor& t : inputs) {
    STD_TORCH_CHECK(t.is_cpu(), op, ": inputs and packed weights must be on one device");
    const ValueType type = value_type(op, t.scalar_type());
    STD_TORCH_CHECK(type != sparsec::kFloat64, op, ": inputs must be float32, bfloat16 or float16");
    const int64_t width = t.dim() ? t.size(t.dim() - 1) : 1, count = t.numel();
    STD_TORCH_CHECK(count == width || count == rows * width, op, ": an input must have 1 or ", rows, " rows of ", width, " numbers, got ",
                    count, " numbers");
    given.push_back(Value::rows(count == width ? 1 : rows, width, type));
  }
  Program program(op, std::move(tensors), constants, std::move(given), code);
  program.check_batch(0);
  struct Result {
    Value value;
    std::vector<int64_t> shape;
  };
  std::vector<Result> wanted;
  for (size_t at = 0; at < results.size();) {
    const bool whole = at + 2 <= results.size() && results[at + 1] >= 0 && static_cast<size_t>(results[at + 1]) <= results.size() - at - 2;
    STD_TORCH_CHECK(whole, op, ": the results end early, at entry ", at);
    const Value value = program.keep(results[at]);
    const auto sizes = results.begin() + static_cast<int64_t>(at) + 2;
    at += 2 + static_cast<size_t>(results[at + 1]);
    wanted.push_back(Result{value, std::vector<int64_t>(sizes, results.begin() + static_cast<int64_t>(at))});
    int64_t count = 1;
    for (int64_t size : wanted.back().shape) {
      STD_TORCH_CHECK(size >= 0, op, ": sizes of a result must not be negative, got ", size);
      count *= size;
    }
    STD_TORCH_CHECK(count == rows * value.size[2] && value.contiguous(), op, ": a result has ", rows * value.size[2], " numbers, not ", count);
  }
  program.plan();
  std::vector<Tensor> found;
  const Call call{std::move(inputs)};
  const Run run = program.run(call);
  for (const Result& result : wanted) {
    Tensor out = empty(Run::kDtypes[result.value.type](), result.shape);
    const int64_t width = result.value.size[2], bytes = result.value.type == sparsec::kFloat32 ? 4 : 2;
    if (result.value.size[1] == rows)
      run.give(result.value, out.mutable_data_ptr(), rows * width);
    else
      for (int64_t r = 0; r < rows; ++r)
        run.give(result.value, static_cast<char*>(out.mutable_data_ptr()) + r * width * bytes, width);
    found.push_back(std::move(out));
  }
  return found;
}

}  // namespace
