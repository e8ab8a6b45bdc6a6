// Products that torch's own dense product does: of dense matrices, and of panels that are expanded before it.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include "choice.h"
#include "pieces.h"

namespace {

using sparsec::ExpandTask;
using torch::stable::Tensor;

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
  spread(tokens, std::max<int64_t>(1, 16384 / rows), [&](int64_t begin, int64_t end) {
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
    spread(panels, 1, [&](int64_t begin, int64_t end) {
      isa.expand(ExpandTask{&w, expanded.get() + begin * kPanel * in, panel + begin, panel + end,
                            scratch(sparsec::panel_scratch(block_columns(w), 0))});
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

}  // namespace
