// What a program computes with, and where it lies: values, their memory, and the steps that make and read them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace {

using sparsec::ValueType;

constexpr size_t kFixed = static_cast<size_t>(-1);  // a constant's buffer

// Numbers in fp32, rounded to a type, seen as [outer][rows][width].
struct Value {
  size_t buffer;
  int64_t offset;  // in floats, as the strides
  int64_t size[3], stride[3];
  ValueType type;

  static Value rows(int64_t count, int64_t width, ValueType type) { return Value{0, 0, {1, count, width}, {count * width, width, 1}, type}; }
  static Value row(int64_t width, ValueType type) { return rows(1, width, type); }
  int64_t numel() const { return size[0] * size[1] * size[2]; }
  void pack() {
    stride[2] = 1;
    stride[1] = size[2];
    stride[0] = size[1] * size[2];
  }
  bool contiguous() const {
    int64_t expected = 1;
    for (int d = 2; d >= 0; expected *= size[d], --d)
      if (size[d] != 1 && stride[d] != expected) return false;
    return true;
  }
  bool dense_rows() const { return size[2] == 1 || stride[2] == 1 || stride[2] == 0; }
};

struct Buffer {
  int64_t floats;
  int64_t place;       // in the memory of a run
  size_t first, last;  // steps
};

enum class Kind { product, element, tensor, join, look_up, attend };

struct Step {
  Kind kind;
  sparsec::ElementOp op;
  size_t out;                 // the first value that it makes
  std::vector<int64_t> from;  // the values that it reads; negative: constants
  size_t item;                // which of its kind
};

// Gives every buffer its place, such that what is needed at once lies apart; returns how many floats that takes.
int64_t place(std::vector<Buffer>& buffers) {
  struct Taken {
    int64_t begin, end;
    size_t last;
  };
  std::vector<Taken> taken;  // in the order of their places
  int64_t total = 0;
  for (Buffer& buffer : buffers) {  // they are in the order of their first steps
    taken.erase(std::remove_if(taken.begin(), taken.end(), [&](const Taken& t) { return t.last < buffer.first; }), taken.end());
    const int64_t floats = (buffer.floats + sparsec::kSpare + 15) / 16 * 16;
    int64_t begin = 0;
    auto at = taken.begin();
    for (; at != taken.end() && at->begin - begin < floats; ++at) begin = at->end;
    taken.insert(at, Taken{begin, begin + floats, buffer.last});
    buffer.place = begin;
    total = std::max(total, begin + floats);
  }
  return total;
}

// This thread's memory of at least so many floats, at a multiple of 64 bytes. It stays from call to call.
float* arena(int64_t floats) {
  struct Memory {
    std::unique_ptr<float[]> held;
    int64_t room = 0;
  };
  thread_local Memory memory;
  if (memory.room < floats) {
    memory.held.reset(new float[static_cast<size_t>(floats + 16)]());
    memory.room = floats;
  }
  float* const start = memory.held.get();
  return start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64 / sizeof(float);
}

}  // namespace
