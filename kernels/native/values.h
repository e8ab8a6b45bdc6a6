// Stored values, and how one steps over them.
//
// V is how a value is stored, A the type of x, bias and result. The kernels reach stored values through a cursor alone, which stands on
// one of them and moves by whole values, also where several share a byte:
//   cursor<V>(values, n)      on the n-th value
//   at + n, at += n           n values on
//   widen(at[n])              the n-th from here as a number
//   address(at)               the byte it stands on, for prefetching
// The primitives of an instruction set (load_wide, load_step, load_half, widen8, expand, add_step, dot) take one.
//
// A lane is 32 bits: one column where values take 32 bits, two where they take 16. A step is one register: 16 lanes, one for each output
// row of a panel. Its values stand lane by lane, in a lane column by column; a word of a bit for each says which are kept.
//
// Plain values are stored as x is: V is A, and a pointer is the cursor. Quantised ones have kernels of their own (digits.h).
#pragma once
#include "convert.h"
#include "kernels.h"

namespace {

template <class V>
struct StoredAs {
  using Cursor = const V*;
  static constexpr int64_t kBits = 8 * sizeof(V);
  static Cursor from(const void* values) { return static_cast<const V*>(values); }
};

template <class V>
using Cursor = typename StoredAs<V>::Cursor;
template <class V>
constexpr int64_t kValueBits = StoredAs<V>::kBits;

// Columns of a lane.
template <class V>
constexpr int kLane = kValueBits<V> < 32 ? 32 / kValueBits<V> : 1;

template <int L>
struct WordOf;
template <>
struct WordOf<1> {
  using Type = uint16_t;
};
template <>
struct WordOf<2> {
  using Type = uint32_t;
};
// Which values of a step are kept: bit kLane * l + c of lane l and column c.
template <class V>
using Word = typename WordOf<kLane<V>>::Type;

template <class V>
inline Cursor<V> cursor(const void* values, int64_t n) {
  return StoredAs<V>::from(values) + n;
}
template <class V>
inline const char* address(const V* at) {
  return reinterpret_cast<const char*>(at);
}

// Whether stored values are fp32 numbers that can be multiplied where they lie.
template <class V>
constexpr bool kAsTheyAre = false;
template <>
constexpr bool kAsTheyAre<float> = true;

}  // namespace
