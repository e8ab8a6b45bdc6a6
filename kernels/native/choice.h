// Which instruction set runs.
#pragma once
#include <atomic>

#include "kernels.h"

#if defined(SPARSEC_X86) && defined(__linux__) && !defined(SPARSEC_SIMDE)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using sparsec::InstructionSet;

#if defined(SPARSEC_X86) && !defined(SPARSEC_SIMDE)
// Whether this process may use matrix tiles of bf16: the CPU has them, and Linux grants their registers to who asks.
bool has_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kTiles = 1u << 24, kBFloat16Tiles = 1u << 22;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  static const bool granted = (d & kTiles) && (d & kBFloat16Tiles) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

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
#if defined(SPARSEC_SIMDE)
  if (&isa == &sparsec::kVbmi2 || &isa == &sparsec::kAvx512Bf16 || &isa == &sparsec::kAmx) return avx512;
#else
  const bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
  if (&isa == &sparsec::kVbmi2) return vbmi2;
  const bool pairs = vbmi2 && isa.pairs && __builtin_cpu_supports("avx512bf16");
  if (&isa == &sparsec::kAvx512Bf16) return pairs;
  if (&isa == &sparsec::kAmx) return pairs && isa.amx && has_tiles();
#endif
  if (&isa == &sparsec::kAvx2) return avx2;
#endif
  return &isa == &sparsec::kPortable;
}

// Whether an instruction set that the CPU has is worth taking. On Intel's CPUs (measured on Emerald Rapids) vdpbf16ps takes two cycles and is
// half as fast as the multiply-adds of fp32 that it stands for, at any number of rows: their matrix tiles are for that. On AMD's Zen 4 a
// prototype with it took 1.24 ms where one with multiply-adds took 1.77 (one row, 90 % zeros).
bool is_fast([[maybe_unused]] const InstructionSet& isa) {
#if defined(SPARSEC_X86)
  return &isa != &sparsec::kAvx512Bf16 || !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

// Best first.
const InstructionSet* const kAll[] = {
#if defined(SPARSEC_X86)
    &sparsec::kAmx, &sparsec::kAvx512Bf16, &sparsec::kVbmi2, &sparsec::kAvx512, &sparsec::kAvx2,
#endif
    &sparsec::kPortable};

const InstructionSet* best() {
  for (const InstructionSet* isa : kAll)
    if (cpu_has(*isa) && is_fast(*isa)) return isa;
  return &sparsec::kPortable;
}

std::atomic<const InstructionSet*> chosen{best()};

std::atomic<int> half_product{-1};  // -1: as the instruction set says; 0, 1: forced by a test

// Whether torch's dense product of fp32 leaves half of the CPU idle: on AMD's CPUs MKL computes with 256 bits at a time, and those of
// family 26 (Zen 5) and later can with 512.
bool has_narrow_stock([[maybe_unused]] const InstructionSet& isa) {
#if defined(SPARSEC_X86) && defined(__linux__) && !defined(SPARSEC_SIMDE)
  static const bool wider = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 15) + (a >> 20 & 255) >= 26;
  }();
  return wider && isa.rows_per_tile >= 12;  // with AVX-512
#else
  return false;
#endif
}

// Whether torch's dense product of a half type is worth calling: only with instructions for it (AMX, or at least AVX-512 BF16), else fp32
// is faster. An instruction set that was forced stands for a CPU that has no better one.
bool has_half_product(sparsec::ValueType type, const InstructionSet& isa) {
  if (type != sparsec::kBFloat16 && type != sparsec::kFloat16) return false;
  const int forced = half_product.load(std::memory_order_relaxed);
  return forced < 0 ? type == sparsec::kBFloat16 && isa.pairs : forced != 0;
}

}  // namespace
