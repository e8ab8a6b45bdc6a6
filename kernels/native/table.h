// The kernels of one instruction set, included last by the file that defines its primitives.
#pragma once
#include "attend.h"
#include "panels.h"

// By value type; fp64 has CSR alone.
#define SPARSEC_TYPES(kernel) \
  { kernel<float>, kernel<BFloat16>, kernel<Float16>, nullptr }
#define SPARSEC_LANES(lanes) \
  { csr_lanes_any<lanes, float>, csr_lanes_any<lanes, BFloat16>, csr_lanes_any<lanes, Float16>, csr_double_any }
// bitmap: one row of x, bf16. amx: see InstructionSet.
#define SPARSEC_TABLE(name, bitmap, amx)                                                                              \
  {                                                                                                              \
    name, kRowsPerTile,                                                                                          \
        {SPARSEC_TYPES(dense_one),                                                                               \
         {csr_one_any<float>, csr_one_any<BFloat16>, csr_one_any<Float16>, csr_double_any},                      \
         {bitmap_one<float>, bitmap, bitmap_one<Float16>, nullptr},                                              \
         SPARSEC_TYPES(bsr_one),                                                                                 \
         SPARSEC_TYPES(nm_rows)},                                                                                 \
        {SPARSEC_TYPES(dense_rows), SPARSEC_TYPES(nm_rows)}, {SPARSEC_LANES(4), SPARSEC_LANES(8), SPARSEC_LANES(16), SPARSEC_LANES(32)},  \
        panels, expand, amx, elementwise, {widen_many<float>, widen_many<BFloat16>, widen_many<Float16>},        \
        {narrow_many<float>, narrow_many<BFloat16>, narrow_many<Float16>},                                       \
        {attend<float>, attend<BFloat16>, attend<Float16>}                                                       \
  }
