// The CPU implementation of sparsec's operators: checks, scratch, threads. The arithmetic is in csr_*.cpp.
//
// Uses torch's stable ABI only, so that one library serves torch 2.10 and later. Schemas live in Python (kernels/ops.py).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "kernels.h"

#if defined(_WIN32)
#error "Windows uses the reference kernels"
#endif
#define SPARSEC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using sparsec::InstructionSet;
using sparsec::Product;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- which instruction set ---------------------------------------------------------------------------------------------

bool cpu_has(const InstructionSet& isa) {
#if defined(SPARSEC_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(SPARSEC_SIMDE)
  const bool avx512 = avx2;  // emulated
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  if (&isa == &sparsec::kAvx512) return avx512;
  if (&isa == &sparsec::kAvx2) return avx2;
#endif
  return &isa == &sparsec::kPortable;
}

// Best first.
const InstructionSet* const kAll[] = {
#if defined(SPARSEC_X86)
    &sparsec::kAvx512, &sparsec::kAvx2,
#endif
    &sparsec::kPortable};

const InstructionSet* best() {
  for (const InstructionSet* isa : kAll)
    if (cpu_has(*isa)) return isa;
  return &sparsec::kPortable;
}

std::atomic<const InstructionSet*> chosen{best()};

// Whether the dense product of a half type is worth calling: only with matrix instructions for it, else fp32 is faster.
bool has_half_product(sparsec::ValueType type) {
#if defined(SPARSEC_X86)
  if (type == sparsec::kBFloat16) return __builtin_cpu_supports("avx512bf16");
#endif
  (void)type;
  return false;
}
std::atomic<int> half_product{-1};  // -1: as the CPU says; 0, 1: forced by a test

// ---- arguments -----------------------------------------------------------------------------------------------------------

struct Csr {
  const void* values;
  const void* columns;
  const int32_t* row_ptr;
  const void* bias;
  int64_t nnz;
  int64_t out_features;
  int64_t in_features;
  sparsec::ValueType type;
  sparsec::IndexType index;
};

sparsec::ValueType value_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return sparsec::kFloat32;
    case ScalarType::BFloat16: return sparsec::kBFloat16;
    case ScalarType::Half: return sparsec::kFloat16;
    case ScalarType::Double: return sparsec::kFloat64;
    default: break;
  }
  STD_TORCH_CHECK(false, "csr_linear: values must be float32, bfloat16, float16 or float64");
  return sparsec::kValueTypes;
}

Csr read_arguments(const Tensor& x, const Tensor& values, const Tensor& col_idx, const Tensor& row_ptr,
                   const std::optional<Tensor>& bias, int64_t in_features) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == in_features, "csr_linear: x must be [..., in_features=", in_features,
                  "], its last dimension is ", x.dim() > 0 ? x.size(x.dim() - 1) : -1);
  Csr csr{};
  csr.type = value_type(values.scalar_type());
  STD_TORCH_CHECK(x.scalar_type() == values.scalar_type(),
                  "csr_linear: x must have the dtype of the weights; convert x, or the model before compiling it, and leave "
                  "torch.autocast off, which changes x and not packed weights");
  const ScalarType index = col_idx.scalar_type();
  STD_TORCH_CHECK((index == ScalarType::Short || index == ScalarType::Int) && row_ptr.scalar_type() == ScalarType::Int,
                  "csr_linear: col_idx must be int16 or int32 and row_ptr int32");
  STD_TORCH_CHECK(values.dim() == 1 && col_idx.dim() == 1 && col_idx.numel() == values.numel() && row_ptr.dim() == 1 &&
                      row_ptr.numel() > 0,
                  "csr_linear: values and col_idx must be [nnz] and row_ptr [out_features + 1], got ", values.numel(), ", ",
                  col_idx.numel(), " and ", row_ptr.numel(), " entries");
  STD_TORCH_CHECK(values.is_cpu() && col_idx.is_cpu() && row_ptr.is_cpu() && x.is_cpu(),
                  "csr_linear: x and the packed weight must be on one device; move the model with .to(device)");
  STD_TORCH_CHECK(values.is_contiguous() && col_idx.is_contiguous() && row_ptr.is_contiguous(),
                  "csr_linear: packed tensors must be contiguous");
  csr.out_features = row_ptr.numel() - 1;
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == values.scalar_type() && bias->dim() == 1 && bias->numel() == csr.out_features &&
                        bias->is_cpu() && bias->is_contiguous(),
                    "csr_linear: bias must be contiguous, of the dtype of the weights, [", csr.out_features, "]");
    csr.bias = bias->const_data_ptr();
  }
  csr.values = values.const_data_ptr();
  csr.columns = col_idx.const_data_ptr();
  csr.row_ptr = static_cast<const int32_t*>(row_ptr.const_data_ptr());
  csr.nnz = values.numel();
  csr.in_features = in_features;
  csr.index = index == ScalarType::Short ? sparsec::kUInt16 : sparsec::kInt32;
  STD_TORCH_CHECK(csr.row_ptr[csr.out_features] == csr.nnz, "csr_linear: row_ptr ends at ", csr.row_ptr[csr.out_features],
                  ", values has ", csr.nnz, " entries");
  return csr;
}

template <class F>
void by_type(sparsec::ValueType type, F f) {
  switch (type) {
    case sparsec::kFloat32: return f(float{});
    case sparsec::kBFloat16: return f(BFloat16{});
    case sparsec::kFloat16: return f(Float16{});
    default: return f(double{});
  }
}

// ---- rows of x: one, or up to 32 at a time ------------------------------------------------------------------------------

constexpr int64_t kWorkPerThread = 16384;  // multiply-adds worth waking a thread for: some 5 us
constexpr int64_t kWorkPerChunk = 131072;  // small enough that a thread whose CPU is taken away does not hold up the others

// Calls f(first, last) with row ranges of about equal numbers of non-zeros, on torch's threads.
template <class F>
void split_rows(const Csr& csr, int64_t rows_of_x, F f) {
  const int64_t work = (csr.nnz + csr.out_features) * std::max<int64_t>(1, rows_of_x / 4);
  const int64_t threads =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work / kWorkPerThread));
  if (threads == 1) return f(int64_t{0}, csr.out_features);
  const int64_t chunks = std::max(threads, work / kWorkPerChunk);
  const int32_t* const begin = csr.row_ptr;
  const int32_t* const end = csr.row_ptr + csr.out_features;
  const auto boundary = [&](int64_t chunk) -> int64_t {
    if (chunk == 0) return 0;
    if (chunk == chunks) return csr.out_features;
    return std::lower_bound(begin, end, static_cast<int32_t>(csr.nnz / chunks * chunk + csr.nnz % chunks * chunk / chunks)) -
           begin;
  };
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      f(boundary(chunk), boundary(chunk + 1));
  });
}

template <class T>
void few_rows(const Csr& csr, const T* x, int64_t tokens, T* out) {
  const InstructionSet& isa = *chosen.load(std::memory_order_relaxed);
  int group = 0;
  while (group + 1 < sparsec::kLaneCounts && sparsec::kLanes[group] < tokens) ++group;
  const int64_t lanes = tokens == 1 ? 1 : sparsec::kLanes[group];
  const sparsec::Kernel kernel = tokens == 1 ? isa.one[csr.type][csr.index] : isa.few[group][csr.type][csr.index];
  std::unique_ptr<float[]> scratch;
  const bool direct = std::is_same_v<T, float> && lanes == 1;
  if (!direct) scratch.reset(new float[csr.in_features * lanes]);
  for (int64_t t = 0; t < tokens; t += lanes) {
    const int64_t used = std::min(lanes, tokens - t);
    if (!direct) {
      const T* from = x + t * csr.in_features;
      for (int64_t i = 0; i < csr.in_features; ++i) {
        float* to = scratch.get() + i * lanes;
        for (int64_t k = 0; k < used; ++k) to[k] = widen(from[k * csr.in_features + i]);
        for (int64_t k = used; k < lanes; ++k) to[k] = 0.0f;
      }
    }
    const void* rows = direct ? static_cast<const void*>(x + t * csr.in_features) : scratch.get();
    const Product product{csr.values, csr.columns, csr.row_ptr, csr.bias, rows, out + t * csr.out_features, csr.out_features,
                          csr.in_features, used, 0, 0};
    split_rows(csr, used, [&](int64_t first, int64_t last) {
      Product part = product;
      part.first = first;
      part.last = last;
      kernel(part);
    });
  }
}

void wide_rows(const Csr& csr, const double* x, int64_t tokens, double* out) {
  const sparsec::Kernel kernel = sparsec::kPortable.one[sparsec::kFloat64][csr.index];
  const Product product{csr.values, csr.columns, csr.row_ptr, csr.bias, x, out, csr.out_features, csr.in_features, tokens, 0, 0};
  split_rows(csr, 4 * tokens, [&](int64_t first, int64_t last) {
    Product part = product;
    part.first = first;
    part.last = last;
    kernel(part);
  });
}

// ---- many rows of x: expand a panel of W, use the dense product ----------------------------------------------------------

constexpr int64_t kPanelElements = 1 << 18;  // 1 MB in fp32: stays in a cache between expanding and using it

template <class I, class T, class P>
void expand_rows(const Csr& csr, int64_t first, int64_t last, P* panel) {
  const T* values = static_cast<const T*>(csr.values);
  const I* columns = static_cast<const I*>(csr.columns);
  for (int64_t r = first; r < last; ++r, panel += csr.in_features) {
    std::memset(static_cast<void*>(panel), 0, sizeof(P) * csr.in_features);
    for (int64_t at = csr.row_ptr[r]; at < csr.row_ptr[r + 1]; ++at) {
      if constexpr (std::is_same_v<T, P>)
        panel[columns[at]] = values[at];
      else
        panel[columns[at]] = widen(values[at]);
    }
  }
}

// A tensor over memory of ours.
Tensor view(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int32_t dtype) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void dense_product(const Tensor& x, const Tensor& weight_t, Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight_t),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// T: of the weights. P: of the dense product, float or T.
template <class T, class P>
void many_rows(const Csr& csr, const T* x, int64_t tokens, T* out, int32_t dtype) {
  const T* bias = static_cast<const T*>(csr.bias);
  const int64_t in = csr.in_features;
  std::unique_ptr<P[]> converted, product;
  const int64_t panel_rows =
      std::min(csr.out_features, std::max<int64_t>(64, kPanelElements / std::max<int64_t>(1, in) / 16 * 16));
  std::unique_ptr<P[]> panel(new P[panel_rows * in]);
  P* rows = nullptr;
  if constexpr (std::is_same_v<T, P>) {
    rows = const_cast<P*>(x);  // read only: a tensor over it is an input of mm
  } else {
    converted.reset(new P[tokens * in]);
    product.reset(new P[tokens * panel_rows]);
    torch::stable::parallel_for(0, tokens * in, 65536, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) converted[i] = widen(x[i]);
    });
    rows = converted.get();
  }
  const Tensor x_view = view(rows, tokens, in, in, 1, dtype);
  for (int64_t first = 0; first < csr.out_features; first += panel_rows) {
    const int64_t count = std::min(panel_rows, csr.out_features - first);
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, 65536 / (in + 1)), [&](int64_t begin, int64_t end) {
      P* to = panel.get() + begin * in;
      if (csr.index == sparsec::kUInt16)
        expand_rows<uint16_t, T, P>(csr, first + begin, first + end, to);
      else
        expand_rows<int32_t, T, P>(csr, first + begin, first + end, to);
    });
    constexpr bool same = std::is_same_v<T, P>;
    P* target = nullptr;
    if constexpr (same)
      target = out + first;
    else
      target = product.get();
    const int64_t stride = same ? csr.out_features : count;
    Tensor out_view = view(target, tokens, count, stride, 1, dtype);
    dense_product(x_view, view(panel.get(), in, count, 1, in, dtype), out_view);
    if (same && !bias) continue;
    torch::stable::parallel_for(0, tokens, std::max<int64_t>(1, 16384 / count), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t r = 0; r < count; ++r) {
          const auto sum = widen(target[t * stride + r]) + (bias ? widen(bias[first + r]) : 0);
          narrow(sum, out + t * csr.out_features + first + r);
        }
    });
  }
}

// Up to how many rows of x the non-zeros are multiplied, 32 rows at a time; beyond, the dense product, which saves no FLOPs,
// wins. Measured on Zen 3, fp32 2048x2048, 128 rows, one thread, as a ratio to F.linear: at 50 % zeros 0.71x against 0.8-0.9x
// for the dense product; at 70 % 1.13x; at 90 % 3.2x against 0.94x. Where x no longer fits the second-level cache, or the CPU
// has matrix instructions for the type, nothing is known beyond 32 rows.
int64_t few_rows_limit(const Csr& csr, bool half) {
  const bool sparse = 10 * csr.nnz <= 3 * csr.out_features * csr.in_features;
  return sparse && csr.in_features <= 4096 && !half ? INT64_MAX : 32;
}

// ---- the operator ----------------------------------------------------------------------------------------------------------

Tensor csr_linear(Tensor x, Tensor values, Tensor col_idx, Tensor row_ptr, std::optional<Tensor> bias, int64_t in_features,
                  int64_t /* nnz */) {
  const Csr csr = read_arguments(x, values, col_idx, row_ptr, bias, in_features);
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  const auto x_sizes = x.sizes();
  std::vector<int64_t> sizes(x_sizes.begin(), x_sizes.end());
  sizes.back() = csr.out_features;
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) tokens *= sizes[i];
  Tensor out = torch::stable::new_empty(x, sizes);
  if (tokens == 0 || csr.out_features == 0) return out;
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  by_type(csr.type, [&](auto zero) {
    using T = decltype(zero);
    const T* x_data = static_cast<const T*>(from);
    T* out_data = static_cast<T*>(to);
    if constexpr (std::is_same_v<T, double>) {
      wide_rows(csr, x_data, tokens, out_data);
    } else {
      const int forced = half_product.load(std::memory_order_relaxed);
      const bool half = !std::is_same_v<T, float> && (forced < 0 ? has_half_product(csr.type) : forced != 0);
      int32_t dtype = 0;
      if (tokens <= few_rows_limit(csr, half)) {
        few_rows(csr, x_data, tokens, out_data);
      } else if (half) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
        many_rows<T, T>(csr, x_data, tokens, out_data, dtype);
      } else {
        many_rows<T, float>(csr, x_data, tokens, out_data, aoti_torch_dtype_float32());
      }
    }
  });
  return out;
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

STABLE_TORCH_LIBRARY_IMPL(sparsec, CPU, m) { m.impl("csr_linear", TORCH_BOX(&csr_linear)); }
