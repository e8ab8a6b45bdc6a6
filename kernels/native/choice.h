// Which instruction set runs.
#pragma once
#include <atomic>

#include "kernels.h"

namespace {

using sparsec::InstructionSet;

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

// Whether the dense product of a half type is worth calling: only with matrix instructions for it (AMX, or at least
// AVX-512 BF16), else fp32 is faster.
bool cpu_has_half_product(sparsec::ValueType type) {
#if defined(SPARSEC_X86)
  if (type == sparsec::kBFloat16) return __builtin_cpu_supports("avx512bf16");
#endif
  (void)type;
  return false;
}
std::atomic<int> half_product{-1};  // -1: as the CPU says; 0, 1: forced by a test

bool has_half_product(sparsec::ValueType type) {
  if (type != sparsec::kBFloat16 && type != sparsec::kFloat16) return false;
  const int forced = half_product.load(std::memory_order_relaxed);
  return forced < 0 ? cpu_has_half_product(type) : forced != 0;
}

}  // namespace
