// Plain C++, for every CPU and compiler that knows GCC's vector types; includes no x86 header.
#define SPARSEC_NO_X86
#include "lanes.h"

namespace {

// Eight chains, so that the sum is bound by loads and not by the latency of the multiply-add.
template <class C, class I>
float dot(C values, const I* columns, const float* x, int64_t stored) {
  Columns<I> column{columns};
  float sums[8] = {};
  int64_t at = 0;
  for (; at + 8 <= stored; at += 8)
    for (int k = 0; k < 8; ++k) sums[k] += widen(values[at + k]) * x[column(at + k)];
  float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  for (; at < stored; ++at) sum += widen(values[at]) * x[column(at)];
  return sum;
}

template <class C>
void widen8(C at, float* out) {
  for (int k = 0; k < 8; ++k) out[k] = widen(at[k]);
}

template <class C>
inline Vec load_wide(C at) {
  float v[kRegister];
  for (int l = 0; l < kRegister; ++l) v[l] = widen(at[l]);
  return load_vec(v);
}

inline void load_step(const Float16* at, Lanes (&columns)[2]) {
  float lanes[2][16];
  for (int l = 0; l < 16; ++l)
    for (int c = 0; c < 2; ++c) lanes[c][l] = widen(at[2 * l + c]);
  for (int c = 0; c < 2; ++c) columns[c] = load_lanes(lanes[c]);
}
inline void load_half(const Float16* at, Eight (&columns)[2]) {
  for (int l = 0; l < 8; ++l)
    for (int c = 0; c < 2; ++c) columns[c][l] = widen(at[2 * l + c]);
}

// Reads a value for every bit, set or not: a branch on a random bit costs more.
template <class C, int L>
inline void expand(C values, uint32_t bits, Lanes (&columns)[L]) {
  float lanes[L][16];
  for (int i = 0; i < 16 * L; ++i) {
    const uint32_t kept = (bits >> i) & 1;
    const float v = widen(values[0]);
    lanes[i % L][i / L] = kept ? v : 0.0f;
    values += kept;
  }
  for (int c = 0; c < L; ++c) columns[c] = load_lanes(lanes[c]);
}
template <class V>
struct Sums {
  Lanes lanes;
};
template <class V>
inline void add_step(Sums<V>& sums, Cursor<V> values, uint32_t bits, const float* x) {
  Lanes columns[kLane<V>];
  expand(values, bits, columns);
  for (int c = 0; c < kLane<V>; ++c) add_product(sums.lanes, columns[c], x[c]);
}
template <class V>
inline Lanes total(const Sums<V>& sums) {
  return sums.lanes;
}

inline Lanes select4(const float* x, const uint8_t* positions) {
  float lanes[16];
  for (int l = 0; l < 16; ++l) lanes[l] = x[(positions[l / 4] >> (2 * (l % 4))) & 3];
  return load_lanes(lanes);
}

inline Lanes select8(const float* x, const uint8_t* positions) {
  float lanes[16];
  for (int half = 0; half < 2; ++half) {
    const uint8_t* b = positions + 3 * half;
    const uint32_t p = b[0] | static_cast<uint32_t>(b[1]) << 8 | static_cast<uint32_t>(b[2]) << 16;
    for (int l = 0; l < 8; ++l) lanes[8 * half + l] = x[(p >> (3 * l)) & 7];
  }
  return load_lanes(lanes);
}

}  // namespace

#define SPARSEC_DIGIT_PRIMITIVES "digits_portable.h"
#include "table.h"

namespace sparsec {
extern const InstructionSet kPortable = instruction_set("portable");
}
