// What is checked of every operator's arguments. Sizes that the kernels rely on are checked here and in formats.h, the contents are not.
//
// Python says the same in better words (kernels/ops.py, explain): these messages name the operator and the rule.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels.h"

namespace {

using sparsec::kPanel;
using sparsec::Matrix;
using sparsec::ValueType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr ScalarType kScalarTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};  // by ValueType

ValueType value_type(const char* op, ScalarType type) {
  for (int i = 0; i < sparsec::kValueTypes; ++i)
    if (type == kScalarTypes[i]) return static_cast<ValueType>(i);
  STD_TORCH_CHECK(false, op, ": values must be float32, bfloat16, float16 or float64");
  return sparsec::kValueTypes;
}

void check_plain(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": x and the packed weight must be on one device; move the model with .to(device)");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": packed tensors must be contiguous");
}

Matrix matrix(const char* op, sparsec::Format format, const Tensor& values, int64_t out_features, int64_t in_features,
              const std::optional<Tensor>& bias) {
  check_plain(op, values);
  Matrix w{};
  w.format = format;
  w.codec = sparsec::kPlain;
  w.type = value_type(op, values.scalar_type());
  STD_TORCH_CHECK(w.type != sparsec::kFloat64 || format == sparsec::kCsr || format == sparsec::kDense, op,
                  ": values must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(out_features >= 0 && in_features >= 0, op, ": out_features and in_features must not be negative");
  w.values = values.const_data_ptr();
  w.stored = values.numel();
  w.out_features = out_features;
  w.in_features = in_features;
  w.rows_per_unit = 1;
  w.lane = w.type == sparsec::kBFloat16 || w.type == sparsec::kFloat16 ? 2 : 1;
  w.units = out_features;
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == values.scalar_type() && bias->dim() == 1 && bias->numel() == out_features &&
                        bias->is_cpu() && bias->is_contiguous(),
                    op, ": bias must be contiguous, of the dtype of the weights, [", out_features, "]");
    w.bias = bias->const_data_ptr();
  }
  return w;
}

const int32_t* starts(const char* op, const Tensor& start, int64_t units, int64_t stored) {
  check_plain(op, start);
  STD_TORCH_CHECK(start.scalar_type() == ScalarType::Int && start.dim() == 1 && start.numel() == units + 1, op,
                  ": the starts must be int32 [", units + 1, "], got ", start.numel(), " entries");
  const int32_t* found = static_cast<const int32_t*>(start.const_data_ptr());
  STD_TORCH_CHECK(found[0] == 0 && found[units] == stored, op, ": the starts run from ", found[0], " to ", found[units],
                  ", the values hold ", stored, " entries");
  return found;
}

void check_x(const char* op, const Tensor& x, const Matrix& w) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == w.in_features, op, ": x must be [..., in_features=", w.in_features,
                  "], its last dimension is ", x.dim() > 0 ? x.size(x.dim() - 1) : -1);
  STD_TORCH_CHECK(x.is_cpu(), op, ": x and the packed weight must be on one device; move the model with .to(device)");
  STD_TORCH_CHECK(x.scalar_type() == kScalarTypes[w.type], op,
                  ": x must have the dtype of the weights; convert x, or the model before compiling it, and leave "
                  "torch.autocast off, which changes x and not packed weights");
}

// torch's number of a tensor's dtype.
int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A new tensor, by the shortest way that the stable ABI has.
Tensor empty(int32_t dtype, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace
