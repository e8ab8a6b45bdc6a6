// For each pattern of 8 bits, which of the next values every lane takes; made by the compiler.
#pragma once
#include <stdint.h>

namespace {

struct ExpandLanes {
  alignas(32) int32_t rows[256][8];  // sign bit: takes none
};
struct ExpandBytes {
  alignas(16) uint8_t rows[256][16];  // two bytes per lane, 0x80: 0
};
struct ExpandBFloat16 {
  alignas(32) uint8_t rows[256][32];  // four bytes per lane, the lower two 0
};

constexpr ExpandLanes expand_lanes() {
  ExpandLanes table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int l = 0; l < 8; ++l) table.rows[bits][l] = (bits >> l) & 1 ? next++ : INT32_MIN;
  }
  return table;
}
constexpr ExpandBytes expand_bytes() {
  ExpandBytes table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int l = 0; l < 8; ++l) {
      const bool kept = (bits >> l) & 1;
      table.rows[bits][2 * l] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
      table.rows[bits][2 * l + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
      next += kept;
    }
  }
  return table;
}

constexpr ExpandBFloat16 expand_bfloat16() {
  ExpandBFloat16 table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int l = 0; l < 8; ++l) {
      const bool kept = (bits >> l) & 1;
      table.rows[bits][4 * l] = table.rows[bits][4 * l + 1] = 0x80;
      table.rows[bits][4 * l + 2] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
      table.rows[bits][4 * l + 3] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
      next += kept;
    }
  }
  return table;
}

constexpr ExpandLanes kExpandLanes = expand_lanes();
constexpr ExpandBytes kExpandBytes = expand_bytes();
constexpr ExpandBFloat16 kExpandBFloat16 = expand_bfloat16();

}  // namespace
