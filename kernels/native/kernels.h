// The interface between the library (library.cpp, which knows torch) and one instruction set (csr_*.cpp, which do not).
//
// An instruction-set file includes no C++ library and no torch header, and keeps everything but its table internal. Else the
// linker could take an inline function that was compiled for AVX-512 and hand it to a CPU without.
#pragma once
#include <stdint.h>

#if defined(__x86_64__) && !defined(SPARSEC_PORTABLE)
#define SPARSEC_X86
#endif

namespace sparsec {

enum ValueType { kFloat32, kBFloat16, kFloat16, kFloat64, kValueTypes };
enum IndexType { kUInt16, kInt32, kIndexTypes };

// One product with rows [first, last) of W [out, in]. fp64 has its own function; all other types read x as fp32.
struct Product {
  const void* values;      // [nnz]
  const void* columns;     // [nnz]
  const int32_t* row_ptr;  // [out + 1]
  const void* bias;        // [out] in the values' type, or null
  const void* x;           // `one`: [in]; `few`: [in][lanes], so that one column serves all rows of x; fp64: [tokens][in]
  void* out;               // [tokens][out_stride] in the values' type
  int64_t out_stride;
  int64_t in_features;
  int64_t tokens;  // rows of x in use, at most `lanes`
  int64_t first;
  int64_t last;
};

using Kernel = void (*)(const Product&);

constexpr int kLaneCounts = 4;
constexpr int kLanes[kLaneCounts] = {4, 8, 16, 32};

// Neither kind reads x at a pruned weight: inf or NaN there does not reach the result, as it does in a dense product and in
// the panels of many rows (library.cpp). Finite x is assumed.
struct InstructionSet {
  const char* name;
  Kernel one[kValueTypes][kIndexTypes];                // one row of x: bound by reading W
  Kernel few[kLaneCounts][kValueTypes][kIndexTypes];  // up to kLanes[i] rows: each index is read once for all of them
};

extern const InstructionSet kPortable;
#if defined(SPARSEC_X86)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace sparsec
