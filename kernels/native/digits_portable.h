// The primitives of digits.h in plain C++.
#pragma once
#define SPARSEC_DIGITS
#define SPARSEC_DIGIT_ROWS 2

namespace {

struct Quads {
  uint8_t codes[64];
};
using Table = const uint8_t*;
inline Table table_of(const uint8_t* codes) { return codes; }

inline IntSums dot(IntSums sums, const Quads& step, uint32_t x) {
  int8_t digits[4];
  int32_t lanes[16];
  memcpy(digits, &x, 4);
  memcpy(lanes, &sums, sizeof(lanes));
  for (int l = 0; l < 16; ++l)
    for (int c = 0; c < 4; ++c) lanes[l] += step.codes[4 * l + c] * digits[c];
  memcpy(&sums, lanes, sizeof(lanes));
  return sums;
}
inline Quads load8(const uint8_t* from) {
  Quads q;
  memcpy(q.codes, from, 64);
  return q;
}
inline Quads load4(const uint8_t* from, Table table) {
  Quads q;
  for (int i = 0; i < 64; ++i) q.codes[i] = table[(from[i / 2] >> (4 * (i % 2))) & 15];
  return q;
}
inline Quads expand8(const uint8_t* from, uint64_t bits) {
  Quads q;
  for (int i = 0; i < 64; ++i) {
    const uint64_t kept = (bits >> i) & 1;
    q.codes[i] = kept ? *from : 128;
    from += kept;
  }
  return q;
}
inline Quads expand4(const uint8_t* from, uint64_t bits, Table table) {
  Quads q;
  int at = 0;
  for (int i = 0; i < 64; ++i) {
    const int kept = static_cast<int>((bits >> i) & 1);
    q.codes[i] = kept ? table[(from[at / 2] >> (4 * (at % 2))) & 15] : 128;
    at += kept;
  }
  return q;
}
inline Quads half8(const uint8_t* from, int h) {
  Quads q = {};
  memcpy(q.codes + 32 * h, from, 32);
  return q;
}
inline Quads half4(const uint8_t* from, Table table, int h) {
  Quads q = {};
  for (int i = 0; i < 32; ++i) q.codes[32 * h + i] = table[(from[i / 2] >> (4 * (i % 2))) & 15];
  return q;
}
inline Quads absent(int h) {
  Quads q = {};
  memset(q.codes + 32 * h, 128, 32);
  return q;
}
inline Quads either(const Quads& a, const Quads& b) {
  Quads q;
  for (int i = 0; i < 64; ++i) q.codes[i] = a.codes[i] | b.codes[i];
  return q;
}
inline Quads ones(uint64_t bits) {
  Quads q;
  for (int i = 0; i < 64; ++i) q.codes[i] = static_cast<uint8_t>((bits >> i) & 1);
  return q;
}
inline void store(uint8_t* to, const Quads& q) { memcpy(to, q.codes, 64); }

}  // namespace
