// The CPU implementation of sparsec's operators: from torch's arguments to the products, and back.
//
// Uses torch's stable ABI only, so that one library serves torch 2.10 and later. Schemas live in Python (kernels/ops.py).
#include <string>

#include "chain.h"
#include "decode_attention.h"
#include "products.h"
#include "step.h"

#if defined(_WIN32)
#error "Windows uses the reference kernels"
#endif
#define SPARSEC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// `weights` holds what the matrices point to.
std::vector<Tensor> product(const char* op, Tensor x, const std::vector<Matrix>& matrices,
                            const std::vector<Tensor>& weights) {
  for (const Matrix& matrix : matrices) check_x(op, x, matrix);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const auto x_sizes = x.sizes();
  std::vector<int64_t> sizes(x_sizes.begin(), x_sizes.end());
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) tokens *= sizes[i];
  const int32_t dtype = dtype_of(x);
  std::vector<Tensor> outs;
  std::vector<Part> busy;
  for (const Matrix& matrix : matrices) {
    sizes.back() = matrix.out_features;
    outs.push_back(empty(dtype, sizes));
    if (tokens && matrix.out_features) busy.push_back(Part{matrix, outs.back().mutable_data_ptr()});
  }
  if (!busy.empty()) multiply(std::move(busy), Input{x.const_data_ptr(), nullptr, tokens, dtype}, weights);
  return outs;
}

template <class F>
Tensor single(F, Tensor x, std::vector<Tensor> tensors, const std::optional<Tensor>& bias, const std::vector<int64_t>& scalars) {
  const Matrix w = F::read(F::kOp, tensors.data(), bias, scalars.data());
  if (bias) tensors.push_back(*bias);
  return product(F::kOp, std::move(x), {w}, tensors)[0];
}

using Bias = std::optional<Tensor>;
Tensor dense_linear(Tensor x, Tensor weight, Bias bias) { return single(Dense{}, x, {weight}, bias, {}); }
Tensor csr_linear(Tensor x, Tensor values, Tensor col_idx, Tensor row_ptr, Bias bias, int64_t in_features, int64_t nnz) {
  return single(Csr{}, x, {values, col_idx, row_ptr}, bias, {in_features, nnz});
}
Tensor bitmap_linear(Tensor x, Tensor values, Tensor bits, Tensor panel_ptr, Bias bias, int64_t out_features, int64_t in_features) {
  return single(Bitmap{}, x, {values, bits, panel_ptr}, bias, {out_features, in_features});
}
Tensor bsr_linear(Tensor x, Tensor values, Tensor col_idx, Tensor row_ptr, Bias bias, int64_t in_features, int64_t nnz) {
  return single(Bsr{}, x, {values, col_idx, row_ptr}, bias, {in_features, nnz});
}
Tensor nm_linear(Tensor x, Tensor values, Tensor index, Bias bias, int64_t out_features, int64_t in_features, int64_t n, int64_t m,
                 int64_t nnz) {
  return single(Nm{}, x, {values, index}, bias, {out_features, in_features, n, m, nnz});
}

Tensor dense_int_linear(Tensor x, Tensor like, Tensor values, Tensor scale, Tensor table, Bias bias, int64_t out_features, int64_t in_features,
                        int64_t group, int64_t kept, int64_t n, int64_t m, int64_t digits) {
  return single(DenseInt{}, x, {like, values, scale, table}, bias, {out_features, in_features, group, kept, n, m, digits});
}
template <class F>
Tensor quantised_bits(Tensor x, Tensor like, Tensor values, Tensor scale, Tensor table, Tensor bits, Tensor panel_ptr, Bias bias,
                      int64_t out_features, int64_t in_features, int64_t group, int64_t kept, int64_t n, int64_t m, int64_t digits) {
  return single(F{}, x, {like, values, scale, table, bits, panel_ptr}, bias, {out_features, in_features, group, kept, n, m, digits});
}

template <class F>
Tensor quantised_rows(Tensor x, Tensor like, Tensor values, Tensor scale, Tensor table, Tensor col_idx, Tensor row_ptr, Bias bias,
                      int64_t in_features, int64_t group, int64_t kept, int64_t n, int64_t m, int64_t digits) {
  return single(F{}, x, {like, values, scale, table, col_idx, row_ptr}, bias, {in_features, group, kept, n, m, digits});
}

// Several matrices, one parallel region.
std::vector<Tensor> several(const char* op, Tensor x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& layout) {
  std::vector<Matrix> matrices;
  size_t used = 0;
  read_parts(op, tensors, used, layout.data(), layout.size(), matrices);
  STD_TORCH_CHECK(used == tensors.size() && !matrices.empty(), op, ": the layout names ", used, " tensors, got ", tensors.size());
  return product(op, std::move(x), matrices, tensors);
}

std::vector<Tensor> fused_linear(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> layout) {
  return several("fused_linear", std::move(x), tensors, layout);
}
Tensor inference_single(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> layout) {
  const std::vector<Tensor> out = several("inference_single", std::move(x), tensors, layout);
  STD_TORCH_CHECK(out.size() == 1, "inference_single: the layout must be that of one part, got ", out.size());
  return out[0];
}
Tensor single_chain(std::vector<Tensor> inputs, std::vector<Tensor> tensors, int64_t rows, std::vector<int64_t> program,
                    std::vector<double> constants, std::vector<int64_t> results) {
  const std::vector<Tensor> out = chain(std::move(inputs), std::move(tensors), rows, std::move(program), std::move(constants),
                                        std::move(results));
  STD_TORCH_CHECK(out.size() == 1, "single_chain: there must be one result, got ", out.size());
  return out[0];
}

// The numbers that Python has as well, a line each: formats with how many tensors and scalars their operators take, instructions of a
// chain, types.
std::string numbers() {
  constexpr const char* types[] = {"float32", "bfloat16", "float16", "float64"};
  constexpr const char* instructions[] = {"product", "add",  "sub",  "mul",   "div",  "maximum", "minimum", "copy", "neg",
                                          "exp",     "sigmoid", "tanh", "erf", "sqrt", "rsqrt",   "relu", "cos", "sin", "mean", "variance",
                                          "view",    "tensor",  "join", "look_up", "attend"};
  static_assert(sizeof(types) / sizeof(types[0]) == sparsec::kValueTypes, "one for each");
  static_assert(sizeof(instructions) / sizeof(instructions[0]) == sparsec::kInstructions, "one for each");
  std::string text = "panel " + std::to_string(kPanel) + "\n";
  for (int i = 0; i < sparsec::kFormatNumbers; ++i)
    by_format(i, [&](auto format) {
      text += std::string("format ") + format.kName + " " + std::to_string(i) + " " + std::to_string(format.kTensors) + " " +
              std::to_string(format.kScalars) + "\n";
    });
  for (int i = 0; i < sparsec::kInstructions; ++i) text += std::string("instruction ") + instructions[i] + " " + std::to_string(i) + "\n";
  for (int i = 0; i < sparsec::kValueTypes; ++i) text += std::string("type ") + types[i] + " " + std::to_string(i) + "\n";
  return text;
}

}  // namespace

// ---- for kernels/library/loader.py, through ctypes ------------------------------------------------------------------------------

// Name of the i-th instruction set of this library, best first; null past the end.
SPARSEC_EXPORT const char* sparsec_isa(int64_t i) {
  return i < static_cast<int64_t>(sizeof(kAll) / sizeof(kAll[0])) ? kAll[i]->name : nullptr;
}
SPARSEC_EXPORT int sparsec_cpu_has(int64_t i) { return cpu_has(*kAll[i]); }
SPARSEC_EXPORT const char* sparsec_chosen() { return chosen.load()->name; }
SPARSEC_EXPORT void sparsec_choose(int64_t i) { chosen.store(i < 0 ? best() : kAll[i]); }  // negative: as it was at first
SPARSEC_EXPORT const char* sparsec_numbers() {
  static const std::string text = numbers();
  return text.c_str();
}
SPARSEC_EXPORT void sparsec_force_half_product(int on) { half_product.store(on); }
// Whether helpers run in place of torch's own threads: -1 as the machine needs it, 0, 1, or 2: they do, and come late.
SPARSEC_EXPORT void sparsec_force_helpers(int on) {
  lateness().force(on);
  Pool::hurried().store(on == 2);
}

SPARSEC_EXPORT void sparsec_end_program(int64_t number) { Steppers::instance().remove(number); }

STABLE_TORCH_LIBRARY_IMPL(sparsec, CPU, m) {
  m.impl("dense_linear", TORCH_BOX(&dense_linear));
  m.impl("csr_linear", TORCH_BOX(&csr_linear));
  m.impl("bitmap_linear", TORCH_BOX(&bitmap_linear));
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("nm_linear", TORCH_BOX(&nm_linear));
  m.impl("dense_int_linear", TORCH_BOX(&dense_int_linear));
  m.impl("bitmap_int_linear", TORCH_BOX(&quantised_bits<BitmapInt>));
  m.impl("bsr_int_linear", TORCH_BOX(&quantised_rows<BsrInt>));
  m.impl("csr_int_linear", TORCH_BOX(&quantised_rows<CsrInt>));
  m.impl("nm_int_linear", TORCH_BOX(&quantised_bits<NmInt>));
  m.impl("fused_linear", TORCH_BOX(&fused_linear));
  m.impl("inference_linear", TORCH_BOX(&fused_linear));
  m.impl("inference_single", TORCH_BOX(&inference_single));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("chain", TORCH_BOX(&chain));
  m.impl("single_chain", TORCH_BOX(&single_chain));
  m.impl("program", TORCH_BOX(&program));
  m.impl("step", TORCH_BOX(&step));
}
