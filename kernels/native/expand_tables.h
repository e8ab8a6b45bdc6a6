// For each pattern of 8 bits, which bytes of the next values every lane takes; made by the compiler.
#pragma once
#include <stdint.h>

namespace {

constexpr uint8_t kNothing = 0x80;  // a byte shuffle makes it 0

template <int Row>
struct ExpandTable {
  alignas(Row) uint8_t rows[256][Row];
};

// Eight lanes of `Lane` bytes, of which the last `Value` come from the value.
template <int Lane, int Value, class Order>
constexpr ExpandTable<8 * Lane> expand_table(Order order) {
  ExpandTable<8 * Lane> table{};
  for (int bits = 0; bits < 256; ++bits)
    for (int l = 0; l < 8; ++l) {
      const int bit = order.bit(l);
      int next = 0;  // of the values that the lane can take
      for (int b = order.first(l); b < bit; ++b) next += (bits >> b) & 1;
      for (int b = 0; b < Lane; ++b) {
        const int from = b - (Lane - Value);
        table.rows[bits][Lane * l + b] = static_cast<uint8_t>((bits >> bit) & 1 && from >= 0 ? Value * next + from : kNothing);
      }
    }
  return table;
}

// One column, two groups of four lanes: each has values of its own.
struct OneColumn {
  constexpr int bit(int l) const { return l; }
  constexpr int first(int l) const { return l / 4 * 4; }
};
// Four lanes of two columns: the first column of each, then the second.
struct TwoColumns {
  constexpr int bit(int l) const { return l % 4 * 2 + l / 4; }
  constexpr int first(int) const { return 0; }
};

// Eight lanes of a byte.
struct Bytes {
  constexpr int bit(int l) const { return l; }
  constexpr int first(int) const { return 0; }
};
// The same from the upper half of a register.
constexpr ExpandTable<8> in_upper_half(ExpandTable<8> table) {
  for (auto& row : table.rows)
    for (auto& byte : row) byte = static_cast<uint8_t>(byte | 8);
  return table;
}

constexpr auto kExpandByte = expand_table<1, 1>(Bytes{});
constexpr auto kExpandByteHigh = in_upper_half(kExpandByte);
constexpr auto kExpandFloat = expand_table<4, 4>(OneColumn{});
constexpr auto kExpandBFloat16 = expand_table<4, 2>(TwoColumns{});  // to the upper half of an fp32
constexpr auto kExpandHalf = expand_table<2, 2>(TwoColumns{});

}  // namespace
