// The CPU implementation of sparsec's operators: from torch's arguments to the products, and back.
//
// Uses torch's stable ABI only, so that one library serves torch 2.10 and later. Schemas live in Python (kernels/ops.py).
#include "arguments.h"
#include "products.h"

#if defined(_WIN32)
#error "Windows uses the reference kernels"
#endif
#define SPARSEC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// A new tensor like x with these sizes, by the shortest way that the stable ABI has.
Tensor empty_like(const Tensor& x, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::vector<Tensor> product(const char* op, Tensor x, std::vector<Part>& parts, const std::vector<ScalarType>& types) {
  for (size_t i = 0; i < parts.size(); ++i) check_x(op, x, parts[i].matrix, types[i]);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const auto x_sizes = x.sizes();
  std::vector<int64_t> sizes(x_sizes.begin(), x_sizes.end());
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) tokens *= sizes[i];
  std::vector<Tensor> outs;
  std::vector<Part> busy;
  for (const Part& part : parts) {
    sizes.back() = part.matrix.out_features;
    outs.push_back(empty_like(x, sizes));
    if (tokens == 0 || part.matrix.out_features == 0) continue;
    busy.push_back(part);
    busy.back().out = outs.back().mutable_data_ptr();
  }
  if (!busy.empty()) multiply(busy, x, tokens);
  return outs;
}

Tensor single(const char* op, Tensor x, const Matrix& w, ScalarType type) {
  std::vector<Part> parts{Part{w}};
  return product(op, std::move(x), parts, {type})[0];
}

Tensor dense_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  return single("dense_linear", x, read_dense(weight, bias), weight.scalar_type());
}
Tensor csr_linear(Tensor x, Tensor values, Tensor col_idx, Tensor row_ptr, std::optional<Tensor> bias, int64_t in_features,
                  int64_t) {
  return single("csr_linear", x, read_csr(values, col_idx, row_ptr, bias, in_features), values.scalar_type());
}
Tensor bitmap_linear(Tensor x, Tensor values, Tensor bits, Tensor panel_ptr, std::optional<Tensor> bias, int64_t out_features,
                     int64_t in_features) {
  return single("bitmap_linear", x, read_bitmap(values, bits, panel_ptr, bias, out_features, in_features),
                values.scalar_type());
}
Tensor bsr_linear(Tensor x, Tensor values, Tensor col_idx, Tensor row_ptr, std::optional<Tensor> bias, int64_t in_features,
                  int64_t) {
  return single("bsr_linear", x, read_bsr(values, col_idx, row_ptr, bias, in_features), values.scalar_type());
}
Tensor nm_linear(Tensor x, Tensor values, Tensor index, std::optional<Tensor> bias, int64_t out_features, int64_t in_features,
                 int64_t m, int64_t) {
  return single("nm_linear", x, read_nm(values, index, bias, out_features, in_features, m), values.scalar_type());
}

// Several matrices, one parallel region. layout: for each part its format, whether it has a bias, and its scalars; tensors: for each
// part those of its format, then the bias.
std::vector<Tensor> several(const char* op, Tensor x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& layout) {
  constexpr size_t kTensors[] = {1, 3, 3, 3, 2}, kScalars[] = {0, 2, 2, 2, 4};
  std::vector<Part> parts;
  std::vector<ScalarType> types;
  size_t t = 0;
  for (size_t s = 0; s < layout.size();) {
    STD_TORCH_CHECK(layout[s] >= 0 && layout[s] < sparsec::kFormats && s + 2 + kScalars[layout[s]] <= layout.size(), op,
                    ": the layout names no format, or ends early, at entry ", s);
    const int64_t format = layout[s];
    const bool has_bias = layout[s + 1] != 0;
    const int64_t* scalar = layout.data() + s + 2;
    STD_TORCH_CHECK(t + kTensors[format] + has_bias <= tensors.size(), op, ": the layout names more tensors than the ", tensors.size(),
                    " given");
    const Tensor* part = tensors.data() + t;
    std::optional<Tensor> bias;
    if (has_bias) bias = part[kTensors[format]];
    switch (format) {
      case sparsec::kDense: parts.push_back(Part{read_dense(part[0], bias)}); break;
      case sparsec::kCsr: parts.push_back(Part{read_csr(part[0], part[1], part[2], bias, scalar[0])}); break;
      case sparsec::kBitmap: parts.push_back(Part{read_bitmap(part[0], part[1], part[2], bias, scalar[0], scalar[1])}); break;
      case sparsec::kBsr: parts.push_back(Part{read_bsr(part[0], part[1], part[2], bias, scalar[0])}); break;
      default: parts.push_back(Part{read_nm(part[0], part[1], bias, scalar[0], scalar[1], scalar[2])});
    }
    types.push_back(part[0].scalar_type());
    t += kTensors[format] + has_bias;
    s += 2 + kScalars[format];
  }
  STD_TORCH_CHECK(t == tensors.size() && !parts.empty(), op, ": the layout names ", t, " tensors, got ", tensors.size());
  return product(op, std::move(x), parts, types);
}

std::vector<Tensor> fused_linear(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> layout) {
  return several("fused_linear", std::move(x), tensors, layout);
}
Tensor inference_single(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> layout) {
  const std::vector<Tensor> out = several("inference_single", std::move(x), tensors, layout);
  STD_TORCH_CHECK(out.size() == 1, "inference_single: the layout must be that of one part, got ", out.size());
  return out[0];
}

}  // namespace

// ---- for kernels/loader.py, through ctypes -------------------------------------------------------------------------------------

// Name of the i-th instruction set of this library, best first; null past the end.
SPARSEC_EXPORT const char* sparsec_isa(int64_t i) {
  return i < static_cast<int64_t>(sizeof(kAll) / sizeof(kAll[0])) ? kAll[i]->name : nullptr;
}
SPARSEC_EXPORT int sparsec_cpu_has(int64_t i) { return cpu_has(*kAll[i]); }
SPARSEC_EXPORT const char* sparsec_chosen() { return chosen.load()->name; }
SPARSEC_EXPORT void sparsec_choose(int64_t i) { chosen.store(kAll[i]); }
SPARSEC_EXPORT void sparsec_force_half_product(int on) { half_product.store(on); }

STABLE_TORCH_LIBRARY_IMPL(sparsec, CPU, m) {
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("csr_linear", TORCH_BOX(&csr_linear));
  m.impl("bitmap_linear", TORCH_BOX(&bitmap_linear));
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("nm_linear", TORCH_BOX(&nm_linear));
  m.impl("fused_linear", TORCH_BOX(&fused_linear));
  m.impl("inference_linear", TORCH_BOX(&fused_linear));
  m.impl("inference_single", TORCH_BOX(&inference_single));
}
