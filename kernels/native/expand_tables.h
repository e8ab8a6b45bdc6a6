// For each pattern of 8 bits, which bytes of the next values every lane takes; made by the compiler.
#pragma once
#include <stdint.h>

namespace {

constexpr uint8_t kNothing = 0x80;  // a byte shuffle makes it 0

template <int Row>
struct ExpandTable {
  alignas(Row) uint8_t rows[256][Row];
};

// Eight lanes of `lane` bytes, of which the last `value` come from the value; the count starts anew after `restart` lanes.
template <int Lane, int Value, int Restart>
constexpr ExpandTable<8 * Lane> expand_table() {
  ExpandTable<8 * Lane> table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int l = 0; l < 8; ++l) {
      if (l % Restart == 0) next = 0;
      const bool kept = (bits >> l) & 1;
      for (int b = 0; b < Lane; ++b) {
        const int from = b - (Lane - Value);
        table.rows[bits][Lane * l + b] = static_cast<uint8_t>(kept && from >= 0 ? Value * next + from : kNothing);
      }
      next += kept;
    }
  }
  return table;
}

constexpr auto kExpandFloat = expand_table<4, 4, 4>();
constexpr auto kExpandBFloat16 = expand_table<4, 2, 8>();  // to the upper half of an fp32
constexpr auto kExpandHalf = expand_table<2, 2, 8>();

}  // namespace
