// CSR product in plain C++, for every CPU and compiler that knows GCC's vector types; includes no x86 header.
#define SPARSEC_NO_X86
#include "convert.h"

namespace {

// Eight chains, so that the sum is bound by loads and not by the latency of the multiply-add.
template <class T, class I>
float dot(const T* values, const I* columns, const float* x, int64_t nnz) {
  float sums[8] = {};
  int64_t at = 0;
  for (; at + 8 <= nnz; at += 8)
    for (int k = 0; k < 8; ++k) sums[k] += widen(values[at + k]) * x[columns[at + k]];
  float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  for (; at < nnz; ++at) sum += widen(values[at]) * x[columns[at]];
  return sum;
}

template <class T>
void widen8(const T* values, float* out) {
  for (int k = 0; k < 8; ++k) out[k] = widen(values[k]);
}

}  // namespace

#include "csr_rows.h"

namespace sparsec {
extern const InstructionSet kPortable = SPARSEC_TABLE("portable");
}
