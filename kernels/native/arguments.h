// From an operator's arguments to a Matrix: every size that the kernels rely on is checked here, the contents are not.
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

using sparsec::Matrix;
using sparsec::ValueType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

sparsec::ValueType value_type(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return sparsec::kFloat32;
    case ScalarType::BFloat16: return sparsec::kBFloat16;
    case ScalarType::Half: return sparsec::kFloat16;
    case ScalarType::Double: return sparsec::kFloat64;
    default: break;
  }
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
  w.type = value_type(op, values.scalar_type());
  STD_TORCH_CHECK(w.type != sparsec::kFloat64 || format == sparsec::kCsr || format == sparsec::kDense, op,
                  ": values must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(out_features >= 0 && in_features >= 0, op, ": out_features and in_features must not be negative");
  w.values = values.const_data_ptr();
  w.stored = values.numel();
  w.out_features = out_features;
  w.in_features = in_features;
  w.rows_per_unit = 1;
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

Matrix read_dense(const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "dense_linear";
  STD_TORCH_CHECK(weight.dim() == 2, op, ": weight must be [out_features, in_features]");
  return matrix(op, sparsec::kDense, weight, weight.size(0), weight.size(1), bias);
}

Matrix read_csr(const Tensor& values, const Tensor& col_idx, const Tensor& row_ptr, const std::optional<Tensor>& bias,
                int64_t in_features) {
  const char* op = "csr_linear";
  STD_TORCH_CHECK(values.dim() == 1 && col_idx.dim() == 1 && col_idx.numel() == values.numel() && row_ptr.dim() == 1 &&
                      row_ptr.numel() > 0,
                  op, ": values and col_idx must be [stored] and row_ptr [out_features + 1], got ", values.numel(), ", ",
                  col_idx.numel(), " and ", row_ptr.numel(), " entries");
  Matrix w = matrix(op, sparsec::kCsr, values, row_ptr.numel() - 1, in_features, bias);
  check_plain(op, col_idx);
  switch (col_idx.scalar_type()) {
    case ScalarType::Short: w.index = sparsec::kUInt16; break;
    case ScalarType::Int: w.index = sparsec::kInt32; break;
    case ScalarType::Byte: w.index = sparsec::kDelta8; break;
    default: STD_TORCH_CHECK(false, op, ": col_idx must be uint8, int16 or int32");
  }
  w.columns = col_idx.const_data_ptr();
  w.start = starts(op, row_ptr, w.out_features, w.stored);
  return w;
}

Matrix read_bitmap(const Tensor& values, const Tensor& bits, const Tensor& panel_ptr, const std::optional<Tensor>& bias,
                   int64_t out_features, int64_t in_features) {
  const char* op = "bitmap_linear";
  Matrix w = matrix(op, sparsec::kBitmap, values, out_features, in_features, bias);
  w.rows_per_unit = sparsec::kPanel;
  w.units = (out_features + sparsec::kPanel - 1) / sparsec::kPanel;
  check_plain(op, bits);
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Short && bits.numel() == w.units * in_features, op,
                  ": bits must be int16 [", w.units, ", ", in_features, "], got ", bits.numel(), " entries");
  STD_TORCH_CHECK(w.stored >= sparsec::kPanel, op, ": values must end with ", sparsec::kPanel, " zeros, got ", w.stored, " values");
  w.columns = bits.const_data_ptr();
  w.start = starts(op, panel_ptr, w.units, w.stored - sparsec::kPanel);
  return w;
}

Matrix read_bsr(const Tensor& values, const Tensor& col_idx, const Tensor& row_ptr, const std::optional<Tensor>& bias,
                int64_t in_features) {
  const char* op = "bsr_linear";
  STD_TORCH_CHECK(values.dim() == 3 && col_idx.dim() == 1 && col_idx.numel() == values.size(0) && row_ptr.dim() == 1 &&
                      row_ptr.numel() > 0,
                  op, ": values must be [blocks, c, r], col_idx [blocks] and row_ptr [out_features / r + 1]");
  const int64_t c = values.size(1), r = values.size(2);
  STD_TORCH_CHECK(c > 0 && r > 0 && r % 8 == 0 && in_features % c == 0, op, ": blocks are of r rows, a multiple of 8, and c columns, "
                  "which divide in_features; got r = ", r, ", c = ", c);
  Matrix w = matrix(op, sparsec::kBsr, values, (row_ptr.numel() - 1) * r, in_features, bias);
  w.rows_per_unit = r;
  w.units = row_ptr.numel() - 1;
  w.r = r;
  w.c = c;
  check_plain(op, col_idx);
  const ScalarType index = col_idx.scalar_type();
  STD_TORCH_CHECK(index == ScalarType::Short || index == ScalarType::Int, op, ": col_idx must be int16 or int32");
  w.index = index == ScalarType::Short ? sparsec::kUInt16 : sparsec::kInt32;
  w.columns = col_idx.const_data_ptr();
  w.start = starts(op, row_ptr, w.units, values.size(0));
  return w;
}

Matrix read_nm(const Tensor& values, const Tensor& index, const std::optional<Tensor>& bias, int64_t out_features,
               int64_t in_features, int64_t m) {
  const char* op = "nm_linear";
  STD_TORCH_CHECK((m == 4 || m == 8) && in_features % m == 0 && values.dim() == 4, op,
                  ": m must be 4 or 8 and divide in_features, values must be [panels, in_features / m, n, 16]");
  Matrix w = matrix(op, sparsec::kNm, values, out_features, in_features, bias);
  w.rows_per_unit = sparsec::kPanel;
  w.units = (out_features + sparsec::kPanel - 1) / sparsec::kPanel;
  w.r = values.size(2);
  w.c = m;
  const int64_t bits = m == 4 ? 2 : 3;
  STD_TORCH_CHECK(values.size(0) == w.units && values.size(1) == in_features / m && values.size(3) == sparsec::kPanel, op,
                  ": values must be [", w.units, ", ", in_features / m, ", n, ", sparsec::kPanel, "]");
  check_plain(op, index);
  const int64_t wanted = w.units * (in_features / m) * w.r * 2 * bits + 4;
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Byte && index.numel() == wanted, op, ": index must be uint8 [", wanted,
                  "], got ", index.numel(), " entries");
  w.columns = index.const_data_ptr();
  return w;
}

void check_x(const char* op, const Tensor& x, const Matrix& w, ScalarType type) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == w.in_features, op, ": x must be [..., in_features=", w.in_features,
                  "], its last dimension is ", x.dim() > 0 ? x.size(x.dim() - 1) : -1);
  STD_TORCH_CHECK(x.is_cpu(), op, ": x and the packed weight must be on one device; move the model with .to(device)");
  STD_TORCH_CHECK(x.scalar_type() == type, op,
                  ": x must have the dtype of the weights; convert x, or the model before compiling it, and leave "
                  "torch.autocast off, which changes x and not packed weights");
}

// For each part its format, whether it has a bias, and its scalars; and of `tensors`, from `used` on, those of its format, then the bias.
void read_parts(const char* op, const std::vector<Tensor>& tensors, size_t& used, const int64_t* layout, size_t length,
                std::vector<Matrix>& matrices, std::vector<ScalarType>& types) {
  constexpr size_t kTensors[] = {1, 3, 3, 3, 2}, kScalars[] = {0, 2, 2, 2, 4};
  for (size_t s = 0; s < length;) {
    STD_TORCH_CHECK(s + 2 <= length && layout[s] >= 0 && layout[s] < sparsec::kFormats && s + 2 + kScalars[layout[s]] <= length, op,
                    ": the layout names no format, or ends early, at entry ", s);
    const int64_t format = layout[s];
    const bool has_bias = layout[s + 1] != 0;
    const int64_t* scalar = layout + s + 2;
    STD_TORCH_CHECK(used + kTensors[format] + has_bias <= tensors.size(), op, ": the layout names more tensors than the ",
                    tensors.size(), " given");
    const Tensor* part = tensors.data() + used;
    std::optional<Tensor> bias;
    if (has_bias) bias = part[kTensors[format]];
    switch (format) {
      case sparsec::kDense: matrices.push_back(read_dense(part[0], bias)); break;
      case sparsec::kCsr: matrices.push_back(read_csr(part[0], part[1], part[2], bias, scalar[0])); break;
      case sparsec::kBitmap: matrices.push_back(read_bitmap(part[0], part[1], part[2], bias, scalar[0], scalar[1])); break;
      case sparsec::kBsr: matrices.push_back(read_bsr(part[0], part[1], part[2], bias, scalar[0])); break;
      default: matrices.push_back(read_nm(part[0], part[1], bias, scalar[0], scalar[1], scalar[2]));
    }
    types.push_back(part[0].scalar_type());
    used += kTensors[format] + has_bias;
    s += 2 + kScalars[format];
  }
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
