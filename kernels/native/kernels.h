// The interface between the library, which knows torch and threads, and one instruction set (isa_*.cpp), which knows neither.
//
// An instruction-set file includes no C++ library and no torch header, and keeps everything but its table internal. Else the
// linker could take an inline function that was compiled for AVX-512 and hand it to a CPU without.
#pragma once
#include <stdint.h>

#if defined(__x86_64__) && !defined(SPARSEC_PORTABLE)
#define SPARSEC_X86
#endif

namespace sparsec {

enum Format {  // as numbered by the layout of fused_linear
  kDense, kCsr, kBitmap, kBsr, kNm, kFormats,
  kDenseInt = 6, kBitmapInt, kNmInt, kBsrInt,  // quantised values: products of digits alone serve them (digits.h)
  kCsrInt,                                     // and these, which are widened (csr.h)
  kFormatNumbers
};
enum Codec { kPlain, kCodecs };                               // of stored values; plain ones are of x's type
enum ValueType { kFloat32, kBFloat16, kFloat16, kFloat64, kValueTypes };
enum IndexType { kUInt16, kInt32, kDelta8, kIndexTypes };

constexpr int64_t kPanel = 16;  // output rows that a vector of lanes serves

// One matrix W [out_features, in_features]. A unit is the smallest piece of work: a row (dense, CSR), a panel of 16 rows (bitmap,
// N:M), a row of blocks (BSR).
struct Matrix {
  Format format;
  Codec codec;           // of the values
  ValueType type;        // of x, bias and result
  IndexType index;       // of the columns of CSR and BSR
  const void* values;    // dense: [out][in]; CSR: [stored]; bitmap: [nnz + 16]; BSR: [blocks][c / lane][r][lane]; N:M: [panels][steps][16][lane]
  const void* columns;   // CSR: [stored]; bitmap: a word for each step [panels][steps]; BSR: [blocks]; N:M: slot positions, 2 or 3 bits each
  const int32_t* start;  // [units + 1], where a unit's values (BSR: blocks) begin; null: all units are of one size
  const void* bias;      // [out_features], or null
  int64_t out_features;
  int64_t in_features;
  int64_t units;
  int64_t rows_per_unit;
  int64_t stored;        // values held
  int64_t r, c;          // BSR: the block; N:M: n, m
  int64_t lane;          // columns of a lane of 32 bits
  // Quantised values:
  const uint16_t* scale;  // bf16 [panels][groups][1 or 2][16]: scales, then middles
  const uint8_t* table;   // [16], the codes of 4 bits
  int64_t group, groups;  // columns that share a scale, 0: all of a row; how many a row has
  int64_t bits;           // 8 or 4
  bool middle;            // whether groups have one
  int64_t digits;         // of a number of x, 1 to 3
};
// Columns of a block, which a decoder gives as a whole; 0: it gives any columns.
constexpr int64_t block_columns(const Matrix& w) { return w.format == kBsr ? w.c : 0; }
// Whether no block reaches from one run of columns into the next.
constexpr bool holds_blocks(const Matrix& w, int64_t run) { return !block_columns(w) || run % block_columns(w) == 0; }

// Units [first, last) of W times up to `tokens` rows of x, into out [tokens][out_stride] of x's type.
struct Task {
  const Matrix* matrix;
  const void* x;          // fp32; `one` [in]; `lanes` [in][lanes]; `rows` [tokens][in]; fp64: fp64 [tokens][in]
  const uint32_t* pairs;  // `one`: x as it is [ceil(in / 2)], two columns side by side; only where the instruction set has `pairs`
  void* out;
  int64_t out_stride;
  int64_t tokens;
  int64_t first;
  int64_t last;
};

// Panels [first, last) of W times many rows of x: a panel is decoded once into a cache and multiplied with all of them.
// Pairs: the same of a bf16 W, by products of pairs.
template <class X>
struct TileTask {
  const Matrix* matrix;
  const X* x;  // [tiles][in][rows_per_tile], absent rows 0; pairs: [tiles][ceil(in / 2)][rows_per_tile], two columns side by side
  int64_t tiles;
  int64_t rows_per_tile;
  void* out;
  int64_t out_stride;
  int64_t tokens;
  int64_t first;
  int64_t last;
  float* scratch;  // panel_scratch() floats; pairs: pair_scratch()
};
using PanelTask = TileTask<float>;
using PairTask = TileTask<uint32_t>;

// Panels [first, last) of W as rows of x's type, [16 * (last - first)][in] (absent rows are left alone).
struct ExpandTask {
  const Matrix* matrix;
  void* out;
  int64_t first;
  int64_t last;
  float* scratch;
};

// Panels [first, last) of a bf16 W times many rows of x, by matrix tiles of 16 rows.
struct AmxTask {
  const Matrix* matrix;
  const uint16_t* x;  // [token_tiles][ceil(in / 32)][16][32], absent ones 0
  int64_t token_tiles;
  void* out;
  int64_t out_stride;
  int64_t tokens;
  int64_t first;
  int64_t last;
  void* scratch;      // amx_scratch() bytes, at a multiple of 64
};

// Panels [first, last) of a quantised W times rows of x as digits.
struct DigitTask {
  const Matrix* matrix;
  const uint32_t* x;     // [tiles][steps of four columns][rows_per_tile][digits], four digits in each, those of absent rows and columns 0
  const float* scale;    // [tiles][groups of columns][rows_per_tile]
  const int32_t* begin;  // [tiles][groups of columns][rows_per_tile][digits]: -128 times the sum of a group's digits
  const int32_t* before; // of blocks [tiles][steps + 1][rows_per_tile][digits]: -128 times the sum of all digits before a step
  int64_t digits;        // 1 to 3
  int64_t tiles;
  int64_t rows_per_tile;
  void* out;
  int64_t out_stride;
  int64_t tokens;
  int64_t first;
  int64_t last;
  float* scratch;  // digit_scratch() floats
};
// One row of x to digits; what belongs to other rows of its tile lies between.
struct DigitizeTask {
  const float* x;  // [in]
  int64_t in;
  int64_t columns;  // of a group
  int64_t digits;
  int64_t rows;  // of the tile
  uint32_t* out;
  float* scale;
  int32_t* begin;
  int32_t* before;  // or null
};
// Columns of x that share a scale: 64, or 32 where the values of W have groups of an odd multiple of it.
constexpr int64_t digit_columns(const Matrix& w) { return w.group % 64 ? 32 : 64; }
constexpr int64_t digit_groups_of(const Matrix& w) { return (w.in_features + digit_columns(w) - 1) / digit_columns(w); }
// Whether blocks of W are multiplied as they stand, and steps without one left out: digits are summed up to each step then.
constexpr bool skips_steps(const Matrix& w) { return w.format == kBsrInt && w.lane == 4; }
constexpr int64_t kDigitScratchSteps = 256;
constexpr int64_t digit_scratch(int64_t rows_of_x) { return kPanel * (kDigitScratchSteps + rows_of_x); }

// As numbered by kernels/chain.py and kernels/program.py; 0 is a product.
enum ElementOp {
  kAdd = 1, kSubtract, kMultiply, kDivide, kMaximum, kMinimum,
  kCopy, kNegate, kExp, kSigmoid, kTanh, kErf, kSqrt, kRsqrt, kRelu,  // of a alone
  kCos, kSin,
  kMean, kVariance,  // of a's rows, to one number each
  kElementOps,
  // What else a program holds: other views of a value, tensors, values side by side, rows of a table, attention.
  kView = kElementOps, kTensor, kJoin, kLookUp, kAttend,
  kInstructions
};

struct Operand {
  const float* from;
  int64_t width;       // numbers per row
  int64_t row_stride;  // 0: the same for every row
  bool one;            // number, for all of a row
};

// out [rows][width], with room for a register behind it, from operands that may be read as far.
struct ElementTask {
  ElementOp op;
  ValueType type;  // that results are rounded to
  Operand a, b;    // b of those that need no second is a
  float* out;
  int64_t rows, width;
};
constexpr int64_t kSpare = 16;  // floats

constexpr int64_t kPositions = 64;  // of a cache, at a time

// Queries that share keys and values [.., stride]: of positions [first, last) the highest score, the sum of e**(score - highest), and
// the sum of the values times these.
struct AttendTask {
  const float* q;     // [queries][padded]
  const void* k;
  const void* v;
  const float* mask;  // by position, added to the scores; or null
  int64_t k_stride, v_stride;
  int64_t queries, width, value_width, padded;
  int64_t first, last;
  float scale;
  float cap;          // of scores, softly; 0: none
  float* scores;      // [queries][kPositions]
  float* out;         // [queries][padded]
  float* highest;     // [queries]
  float* sum;         // [queries]
};

using Kernel = void (*)(const Task&);
constexpr int64_t kFewCodedRows = 8;  // of x, times codes in CSR

constexpr int kLaneCounts = 4;
constexpr int kLanes[kLaneCounts] = {4, 8, 16, 32};

constexpr int64_t kDecodedColumns = 256;  // of a panel at a time: 16 KB, half of a first-level cache
constexpr int64_t kPanelGroup = 8;        // panels that go through the columns together, while that part of x is in a cache

constexpr int64_t panel_scratch(int64_t block_columns, int64_t rows_of_x) {
  return kPanel * (2 * kDecodedColumns + block_columns) + (kDecodedColumns + 2) + kPanelGroup * kPanel * rows_of_x;
}

constexpr int64_t kPairColumns = 256;  // of two panels at a time: 16 KB, half of a first-level cache

constexpr int64_t pair_scratch(int64_t block_columns, int64_t rows_of_x) {
  return kPanel * kPairColumns + kPanelGroup * kPanel * rows_of_x + panel_scratch(block_columns, 0);
}

constexpr int64_t kAmxColumns = 512;  // of two panels at a time: 32 KB, most of a first-level cache
constexpr int64_t kAmxPairs = 8;      // pairs of panels that go through the columns together

constexpr int64_t amx_scratch(int64_t block_columns, int64_t token_tiles) {
  return 64 * kAmxColumns + 4096 * kAmxPairs * ((token_tiles + 1) / 2) + 4 * panel_scratch(block_columns, 0);
}

// Of one format, by codec and x's type; null where there is none.
struct FormatKernels {
  Kernel one[kCodecs][kValueTypes];                 // one row of x, bound by reading W; fp64: any number of them
  Kernel rows[kCodecs][kValueTypes];                // a few rows of x
  Kernel lanes[kLaneCounts][kCodecs][kValueTypes];  // up to kLanes[i] rows of x: each index is read once for all of them
};

// Products of one row skip pruned weights in CSR and multiply them as zeros elsewhere: finite x is assumed.
struct InstructionSet {
  const char* name;
  int64_t rows_per_tile;                      // at most, in PanelTask
  FormatKernels formats[kFormats];
  void (*panels)(const PanelTask&);           // many rows of x; fp32, bf16, fp16
  void (*expand)(const ExpandTask&);
  void (*pairs)(const PairTask&);             // bf16, two rows of x and more; null: there are no products of pairs
  void (*amx)(const AmxTask&);                // bf16, two rows of x and more; null: there are no tiles
  Kernel csr_codes;                           // a few rows of x, times codes in CSR
  void (*digits)(const DigitTask&);           // other quantised values
  void (*digitize)(const DigitizeTask&);
  int64_t digit_rows;                         // at most, in DigitTask
  void (*elementwise)(const ElementTask&);
  void (*widen[kFloat64])(const void*, float*, int64_t);
  void (*narrow[kFloat64])(const float*, void*, int64_t);
  void (*attend[kFloat64])(const AttendTask&);
};

// AVX2's, which AVX-512 without VBMI2 and VNNI takes too.
void avx2_digits(const DigitTask&);
void avx2_digitize(const DigitizeTask&);

extern const InstructionSet kPortable;
#if defined(SPARSEC_X86)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const InstructionSet kVbmi2;       // AVX-512 that expands numbers of 16 bits
extern const InstructionSet kAvx512Bf16;  // that, and products of pairs of bf16
extern const InstructionSet kAmx;         // that, and matrix tiles
#endif

}  // namespace sparsec
