// The kernels of one instruction set, included last by the file that defines its primitives.
#pragma once
#include "attend.h"
#include "digits.h"
#include "panels.h"

// By x's type, with plain values; fp64 has kernels of its own.
#define SPARSEC_BY_TYPE(kernel, doubles) \
  { {kernel<float, float>, kernel<BFloat16, BFloat16>, kernel<Float16, Float16>, doubles} }
#define SPARSEC_BY_LANES(L) \
  { {F::template lanes<L, float, float>, F::template lanes<L, BFloat16, BFloat16>, F::template lanes<L, Float16, Float16>, F::doubles} }

namespace {

template <class F>
constexpr sparsec::FormatKernels kernels_of() {
  return {SPARSEC_BY_TYPE(F::template one, F::doubles), SPARSEC_BY_TYPE(F::template rows, nullptr),
          {SPARSEC_BY_LANES(4), SPARSEC_BY_LANES(8), SPARSEC_BY_LANES(16), SPARSEC_BY_LANES(32)}};
}

template <class... F>
constexpr sparsec::InstructionSet with_formats(const char* name, FormatList<F...>) {
  return {name,
          kRowsPerTile,
          {kernels_of<F>()...},
          panels,
          expand,
          nullptr,
          nullptr,
          csr_codes,
          digits,
          digitize,
          SPARSEC_DIGIT_ROWS,
          elementwise,
          {widen_many<float>, widen_many<BFloat16>, widen_many<Float16>},
          {narrow_many<float>, narrow_many<BFloat16>, narrow_many<Float16>},
          {attend<float>, attend<BFloat16>, attend<Float16>}};
}
constexpr sparsec::InstructionSet instruction_set(const char* name) { return with_formats(name, Formats{}); }

}  // namespace
