// What the library knows of each format: one struct each, with
//   kFormat, kName, kOp      its number, its name in Python, its operator
//   kTensors, kScalars       of its operator, between x and bias, and after the bias
//   read()                   a Matrix of them, every size checked
//   bytes()                  what a product reads, for cutting it into pieces
//   way()                    how more than one row of x is multiplied (fp64: any number)
// Its kernels are in the header of its name. A new format is such a struct, a line in by_format(), a number in kernels.h, and its
// header's line in panels.h.
#pragma once
#include "arguments.h"
#include "choice.h"
#include "inputs.h"

namespace {

constexpr int64_t kFewRows = 8;
// Of x, from which on it pays to turn panels of a dense matrix where torch's product is narrow (Zen 5, fp32, as ratios to F.linear: 16 rows
// of 576x576 0.79x, 64 rows 1.09x, 512 rows 1.55x; of 8960x1536 1.19x, 1.58x, 2.19x).
constexpr int64_t kTurnedRows = 32;

constexpr int64_t type_bytes(ValueType type) {
  constexpr int64_t bytes[] = {4, 2, 2, 8};
  return bytes[type];
}
// Of x, bias and result.
constexpr int64_t result_bytes(const Matrix& w) { return type_bytes(w.type); }
// Of stored values.
constexpr int64_t stored_bytes(const Matrix& w, int64_t values) { return values * type_bytes(w.type); }

constexpr int64_t index_bytes(const Matrix& w) {
  constexpr int64_t bytes[] = {2, 4, 1};
  return bytes[w.index];
}

// Bytes read for the units before `unit`: per_start * start[unit] + per_unit * unit.
struct Bytes {
  int64_t per_start, per_unit;
  const int32_t* start;

  int64_t before(int64_t unit) const { return per_unit * unit + (start ? per_start * start[unit] : 0); }
};

// Rows of x up to which products of pairs are faster than an expansion and torch's dense product of bf16. Measured on Zen 5, two threads,
// bitmap of 50 %, pairs and the other way as ratios to F.linear: 512 rows of 1536x576 0.89x and 0.78x, of 576x1536 0.82x and 0.77x, of
// 4096x4096 0.95x and 0.84x; 2048 rows 0.82x and 0.90x, 0.76x and 0.87x, 0.94x and 0.91x.
constexpr int64_t kFewTokens = 1024;

bool fits_pairs(const Matrix& w, const InstructionSet& isa) {
  return isa.pairs && w.type == sparsec::kBFloat16 && holds_blocks(w, sparsec::kPairColumns);
}
bool fits_tiles(const Matrix& w, const InstructionSet& isa) {
  return isa.amx && w.type == sparsec::kBFloat16 && holds_blocks(w, sparsec::kAmxColumns);
}

// Where nothing else is better: panels of W are decoded, and multiplied with all rows of x.
Way decoded(const Matrix& w, int64_t tokens, const InstructionSet& isa) {
  if (fits_tiles(w, isa)) return Way::amx;
  const bool pairs = fits_pairs(w, isa);
  if (has_half_product(w.type, isa) && tokens > (pairs ? kFewTokens : 32)) return Way::half;
  return pairs ? Way::pairs : Way::panels;
}

struct Dense {
  static constexpr sparsec::Format kFormat = sparsec::kDense;
  static constexpr const char *kName = "dense", *kOp = "dense_linear";
  static constexpr size_t kTensors = 1, kScalars = 0;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t*) {
    const Tensor& weight = tensors[0];
    STD_TORCH_CHECK(weight.dim() == 2, op, ": weight must be [out_features, in_features]");
    return matrix(op, kFormat, weight, weight.size(0), weight.size(1), bias);
  }
  static Bytes bytes(const Matrix& w) { return {0, stored_bytes(w, w.in_features), nullptr}; }
  static Way way(const Matrix& w, int64_t tokens, const InstructionSet& isa) {
    if (w.type == sparsec::kFloat64) return Way::stock;
    if (tokens <= kFewRows) return Way::rows;
    if (w.type == sparsec::kFloat32) return tokens >= kTurnedRows && has_narrow_stock(isa) ? Way::panels : Way::stock;
    return has_half_product(w.type, isa) ? Way::stock : Way::panels;
  }
};

// Where the non-zeros of rows stand.
void read_columns(const char* op, Matrix& w, const Tensor& col_idx, const Tensor& row_ptr) {
  check_plain(op, col_idx);
  switch (col_idx.scalar_type()) {
    case ScalarType::Short: w.index = sparsec::kUInt16; break;
    case ScalarType::Int: w.index = sparsec::kInt32; break;
    case ScalarType::Byte: w.index = sparsec::kDelta8; break;
    default: STD_TORCH_CHECK(false, op, ": col_idx must be uint8, int16 or int32");
  }
  w.columns = col_idx.const_data_ptr();
  w.start = starts(op, row_ptr, w.out_features, col_idx.numel());
}

struct Csr {
  static constexpr sparsec::Format kFormat = sparsec::kCsr;
  static constexpr const char *kName = "csr", *kOp = "csr_linear";
  static constexpr size_t kTensors = 3, kScalars = 2;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const Tensor &values = tensors[0], &col_idx = tensors[1], &row_ptr = tensors[2];
    STD_TORCH_CHECK(values.dim() == 1 && col_idx.dim() == 1 && col_idx.numel() == values.numel() && row_ptr.dim() == 1 &&
                        row_ptr.numel() > 0,
                    op, ": values and col_idx must be [stored] and row_ptr [out_features + 1], got ", values.numel(), ", ",
                    col_idx.numel(), " and ", row_ptr.numel(), " entries");
    Matrix w = matrix(op, kFormat, values, row_ptr.numel() - 1, scalars[0], bias);
    read_columns(op, w, col_idx, row_ptr);
    return w;
  }
  static Bytes bytes(const Matrix& w) { return {stored_bytes(w, 1) + index_bytes(w), 16, w.start}; }
  static Way way(const Matrix& w, int64_t tokens, const InstructionSet& isa) {
    if (w.type == sparsec::kFloat64) return Way::one;
    return one_by_one(w, tokens, isa) ? Way::lanes : decoded(w, tokens, isa);
  }

  // Up to how many rows of x the non-zeros are multiplied one by one, 32 rows at a time; beyond, panels win, although they save no FLOPs.
  // Measured on Zen 3, fp32 2048x2048, 128 rows, one thread, as a ratio to F.linear: at 50 % zeros 0.71x against 0.8-0.9x of a dense product;
  // at 70 % 1.13x; at 90 % 3.2x against 0.94x. Where x no longer fits the second-level cache, or the CPU has matrix instructions for the
  // type, nothing is known beyond 32 rows.
  static bool one_by_one(const Matrix& w, int64_t tokens, const InstructionSet& isa) {
    const bool sparse = 10 * w.stored <= 3 * w.out_features * w.in_features;
    return tokens <= 32 || (sparse && w.in_features <= 4096 && !has_half_product(w.type, isa));
  }
};

struct Bitmap {
  static constexpr sparsec::Format kFormat = sparsec::kBitmap;
  static constexpr const char *kName = "bitmap", *kOp = "bitmap_linear";
  static constexpr size_t kTensors = 3, kScalars = 2;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const Tensor &values = tensors[0], &bits = tensors[1], &panel_ptr = tensors[2];
    Matrix w = matrix(op, kFormat, values, scalars[0], scalars[1], bias);
    w.rows_per_unit = kPanel;
    w.units = (w.out_features + kPanel - 1) / kPanel;
    check_plain(op, bits);
    const int64_t steps = (w.in_features + w.lane - 1) / w.lane;
    STD_TORCH_CHECK(bits.scalar_type() == (w.lane == 1 ? ScalarType::Short : ScalarType::Int) && bits.numel() == w.units * steps, op,
                    ": bits must be ", w.lane == 1 ? "int16 [" : "int32 [", w.units, ", ", steps, "], got ", bits.numel(), " entries");
    STD_TORCH_CHECK(w.stored >= kPanel, op, ": values must end with ", kPanel, " zeros, got ", w.stored, " values");
    w.columns = bits.const_data_ptr();
    w.start = starts(op, panel_ptr, w.units, w.stored - kPanel);
    return w;
  }
  // A column costs time beside its bits.
  static Bytes bytes(const Matrix& w) { return {stored_bytes(w, 1), 4 * w.in_features, w.start}; }
  static Way way(const Matrix& w, int64_t tokens, const InstructionSet& isa) { return decoded(w, tokens, isa); }
};

// Where blocks stand: values [blocks, ...], their columns of blocks, and where rows of blocks begin.
void read_blocks(const char* op, Matrix& w, const Tensor& values, const Tensor& col_idx, const Tensor& row_ptr) {
  check_plain(op, col_idx);
  const ScalarType index = col_idx.scalar_type();
  STD_TORCH_CHECK((index == ScalarType::Short || index == ScalarType::Int) && col_idx.dim() == 1 && col_idx.numel() == values.size(0), op,
                  ": col_idx must be int16 or int32 [", values.size(0), "]");
  w.index = index == ScalarType::Short ? sparsec::kUInt16 : sparsec::kInt32;
  w.columns = col_idx.const_data_ptr();
  w.start = starts(op, row_ptr, w.units, values.size(0));
}

struct Bsr {
  static constexpr sparsec::Format kFormat = sparsec::kBsr;
  static constexpr const char *kName = "bsr", *kOp = "bsr_linear";
  static constexpr size_t kTensors = 3, kScalars = 2;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const Tensor &values = tensors[0], &col_idx = tensors[1], &row_ptr = tensors[2];
    STD_TORCH_CHECK(values.dim() == 4 && row_ptr.dim() == 1 && row_ptr.numel() > 0, op,
                    ": values must be [blocks, c / lane, r, lane] and row_ptr [out_features / r + 1]");
    const int64_t lane = values.size(3), c = values.size(1) * lane, r = values.size(2), in_features = scalars[0];
    STD_TORCH_CHECK(c > 0 && r > 0 && r % 8 == 0 && in_features % c == 0, op, ": blocks are of r rows, a multiple of 8, and c columns, "
                    "which divide in_features; got r = ", r, ", c = ", c);
    Matrix w = matrix(op, kFormat, values, (row_ptr.numel() - 1) * r, in_features, bias);
    w.rows_per_unit = r;
    w.units = row_ptr.numel() - 1;
    w.r = r;
    w.c = c;
    STD_TORCH_CHECK(lane == 1 || (lane == w.lane && c % lane == 0), op, ": a lane holds ", w.lane, " columns, or one; got ", lane);
    w.lane = lane;
    read_blocks(op, w, values, col_idx, row_ptr);
    return w;
  }
  static Bytes bytes(const Matrix& w) { return {stored_bytes(w, w.r * w.c) + index_bytes(w), 16 * w.r, w.start}; }
  static Way way(const Matrix& w, int64_t tokens, const InstructionSet& isa) { return decoded(w, tokens, isa); }
};

struct Nm {
  static constexpr sparsec::Format kFormat = sparsec::kNm;
  static constexpr const char *kName = "nm", *kOp = "nm_linear";
  static constexpr size_t kTensors = 2, kScalars = 5;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const Tensor &values = tensors[0], &index = tensors[1];
    const int64_t in_features = scalars[1], n = scalars[2], m = scalars[3];
    STD_TORCH_CHECK((m == 4 || m == 8) && n > 0 && n < m && in_features % m == 0 && values.dim() == 4, op,
                    ": m must be 4 or 8 and divide in_features, n from 1 to m - 1, values [panels, steps, 16, lane]");
    Matrix w = matrix(op, kFormat, values, scalars[0], in_features, bias);
    w.rows_per_unit = kPanel;
    w.units = (w.out_features + kPanel - 1) / kPanel;
    w.r = n;
    w.c = m;
    const int64_t bits = m == 4 ? 2 : 3, steps = (in_features / m * n + w.lane - 1) / w.lane;
    STD_TORCH_CHECK(values.size(0) == w.units && values.size(1) == steps && values.size(2) == kPanel && values.size(3) == w.lane, op,
                    ": values must be [", w.units, ", ", steps, ", ", kPanel, ", ", w.lane, "]");
    check_plain(op, index);
    const int64_t wanted = w.units * (in_features / m) * w.r * 2 * bits + 4;
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::Byte && index.numel() == wanted, op, ": index must be uint8 [", wanted,
                    "], got ", index.numel(), " entries");
    w.columns = index.const_data_ptr();
    return w;
  }
  static Bytes bytes(const Matrix& w) { return {0, (stored_bytes(w, kPanel) + w.c) * w.r * (w.in_features / w.c), nullptr}; }
  static Way way(const Matrix& w, int64_t tokens, const InstructionSet& isa) {
    return tokens <= kFewRows && !fits_tiles(w, isa) ? Way::rows : decoded(w, tokens, isa);
  }
};

// Quantised values: like [0] tells x's type; the rest as in sparsec/formats/quantised.py.
struct Quantised {
  static Matrix read(const char* op, sparsec::Format format, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const int64_t out_features = scalars[0], in_features = scalars[1], group = scalars[2];
    const Tensor &like = tensors[0], &values = tensors[1], &scale = tensors[2], &table = tensors[3];
    Matrix w = matrix(op, format, like, out_features, in_features, bias);
    check_plain(op, values);
    check_plain(op, scale);
    check_plain(op, table);
    w.rows_per_unit = kPanel;
    w.units = (out_features + kPanel - 1) / kPanel;
    w.lane = 4;
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Byte && table.scalar_type() == ScalarType::Byte &&
                        (table.numel() == 0 || table.numel() == 16),
                    op, ": values must be uint8, and table uint8 [0] or [16]");
    w.bits = table.numel() ? 4 : 8;
    w.table = static_cast<const uint8_t*>(table.const_data_ptr());
    w.group = group;
    STD_TORCH_CHECK(group >= 0 && group % 32 == 0, op, ": group must be a multiple of 32, got ", group);
    w.groups = group ? (in_features + group - 1) / group : 1;
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Short && scale.dim() == 4 && scale.size(0) == w.units && scale.size(1) == w.groups &&
                        (scale.size(2) == 1 || scale.size(2) == 2) && scale.size(3) == kPanel,
                    op, ": scale must be int16 [", w.units, ", ", w.groups, ", 1 or 2, ", kPanel, "]");
    w.scale = static_cast<const uint16_t*>(scale.const_data_ptr());
    w.middle = scale.size(2) == 2;
    w.values = values.const_data_ptr();
    w.stored = values.numel();
    w.digits = scalars[6];
    STD_TORCH_CHECK(w.digits >= 1 && w.digits <= 3, op, ": digits must be 1, 2 or 3, got ", w.digits);
    return w;
  }
  static int64_t steps(const Matrix& w) { return (w.in_features + 3) / 4; }
  // A step costs time beside its bytes.
  static int64_t beside(const Matrix& w) { return 16 * steps(w) + 32 * w.groups * (1 + w.middle); }
  static Way way(const Matrix&, int64_t, const InstructionSet&) { return Way::digits; }
};

struct DenseInt : Quantised {
  static constexpr sparsec::Format kFormat = sparsec::kDenseInt;
  static constexpr const char *kName = "dense_int", *kOp = "dense_int_linear";
  static constexpr size_t kTensors = 4, kScalars = 7;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const Matrix w = Quantised::read(op, kFormat, tensors, bias, scalars);
    STD_TORCH_CHECK(w.stored == w.units * steps(w) * 8 * w.bits, op, ": values must hold ", w.units * steps(w) * 8 * w.bits, " bytes, got ", w.stored);
    return w;
  }
  static Bytes bytes(const Matrix& w) { return {0, steps(w) * 8 * w.bits + beside(w), nullptr}; }
};

struct BitmapInt : Quantised {
  static constexpr sparsec::Format kFormat = sparsec::kBitmapInt;
  static constexpr const char *kName = "bitmap_int", *kOp = "bitmap_int_linear";
  static constexpr size_t kTensors = 6, kScalars = 7;
  static constexpr int64_t kSpare = 64;  // bytes

  static Matrix read_as(const char* op, sparsec::Format format, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    Matrix w = Quantised::read(op, format, tensors, bias, scalars);
    const Tensor &bits = tensors[4], &panel_ptr = tensors[5];
    check_plain(op, bits);
    STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Long && bits.numel() == w.units * steps(w), op, ": bits must be int64 [", w.units, ", ",
                    steps(w), "], got ", bits.numel(), " entries");
    STD_TORCH_CHECK(w.stored >= kSpare, op, ": values must end with ", kSpare, " zeros, got ", w.stored, " bytes");
    w.columns = bits.const_data_ptr();
    w.start = starts(op, panel_ptr, w.units, w.stored - kSpare);
    return w;
  }
  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    return read_as(op, kFormat, tensors, bias, scalars);
  }
  static Bytes bytes(const Matrix& w) { return {1, 8 * steps(w) + beside(w), w.start}; }
};

// A bitmap that keeps n of every m columns.
struct NmInt : BitmapInt {
  static constexpr sparsec::Format kFormat = sparsec::kNmInt;
  static constexpr const char *kName = "nm_int", *kOp = "nm_int_linear";

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    return read_as(op, kFormat, tensors, bias, scalars);
  }
};

// Blocks of codes: a lane holds four columns, or one where blocks have no multiple of four.
struct BsrInt : Quantised {
  static constexpr sparsec::Format kFormat = sparsec::kBsrInt;
  static constexpr const char *kName = "bsr_int", *kOp = "bsr_int_linear";
  static constexpr size_t kTensors = 6, kScalars = 6;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const Tensor &values = tensors[1], &table = tensors[3], &col_idx = tensors[4], &row_ptr = tensors[5];
    STD_TORCH_CHECK(values.dim() == 4 && row_ptr.dim() == 1 && row_ptr.numel() > 0, op,
                    ": values must be [blocks, c / lane, r, bytes of a lane] and row_ptr [out_features / r + 1]");
    const int64_t bits = table.numel() ? 4 : 8, lane = values.size(3) * 8 / bits, r = values.size(2), c = values.size(1) * lane;
    const int64_t in_features = scalars[0], units = row_ptr.numel() - 1;
    STD_TORCH_CHECK((lane == 4 || (lane == 1 && bits == 8)) && c > 0 && r > 0 && r % 8 == 0 && in_features % c == 0, op,
                    ": blocks are of r rows, a multiple of 8, and c columns, which divide in_features; got r = ", r, ", c = ", c);
    const int64_t all[] = {units * r, in_features, scalars[1], scalars[2], scalars[3], scalars[4], scalars[5]};
    Matrix w = Quantised::read(op, kFormat, tensors, bias, all);
    w.rows_per_unit = r;
    w.units = units;
    w.r = r;
    w.c = c;
    w.lane = lane;
    read_blocks(op, w, values, col_idx, row_ptr);
    return w;
  }
  static Bytes bytes(const Matrix& w) {
    return {w.r * w.c * w.bits / 8 + index_bytes(w), w.r / 8 * (16 + 16 * w.groups * (1 + w.middle)), w.start};
  }
};

// Codes in CSR are widened: a group of 64 columns keeps too few of them for sums of digits.
struct CsrInt : Quantised {
  static constexpr sparsec::Format kFormat = sparsec::kCsrInt;
  static constexpr const char *kName = "csr_int", *kOp = "csr_int_linear";
  static constexpr size_t kTensors = 6, kScalars = 6;

  static Matrix read(const char* op, const Tensor* tensors, const std::optional<Tensor>& bias, const int64_t* scalars) {
    const Tensor &col_idx = tensors[4], &row_ptr = tensors[5];
    STD_TORCH_CHECK(col_idx.dim() == 1 && row_ptr.dim() == 1 && row_ptr.numel() > 0, op,
                    ": col_idx must be [stored] and row_ptr [out_features + 1]");
    const int64_t all[] = {row_ptr.numel() - 1, scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5]};
    Matrix w = Quantised::read(op, kFormat, tensors, bias, all);
    const int64_t bytes = (col_idx.numel() * w.bits + 7) / 8;
    STD_TORCH_CHECK(w.stored == bytes, op, ": values must hold ", bytes, " bytes, got ", w.stored);
    w.rows_per_unit = 1;
    w.units = w.out_features;
    w.lane = 1;
    read_columns(op, w, col_idx, row_ptr);
    return w;
  }
  static Bytes bytes(const Matrix& w) { return {w.bits / 8 + index_bytes(w), 16 + 2 * w.groups * (1 + w.middle), w.start}; }
  static Way way(const Matrix&, int64_t tokens, const InstructionSet&) { return tokens <= sparsec::kFewCodedRows ? Way::rows : Way::panels; }
};

// f(format), for the one of that number; false where there is none.
template <class F>
bool by_format(int64_t number, F f) {
  const auto is = [&](auto format) {
    if (number != format.kFormat) return false;
    f(format);
    return true;
  };
  return is(Dense{}) || is(Csr{}) || is(Bitmap{}) || is(Bsr{}) || is(Nm{}) || is(DenseInt{}) || is(BitmapInt{}) || is(NmInt{}) ||
         is(BsrInt{}) || is(CsrInt{});
}

Bytes bytes_of(const Matrix& w) {
  Bytes found{};
  by_format(w.format, [&](auto format) { found = format.bytes(w); });
  return found;
}

Way way_of(const Matrix& w, int64_t tokens, const InstructionSet& isa) {
  if (tokens == 1 && w.type != sparsec::kFloat64 && w.format < sparsec::kFormats) return Way::one;
  Way found = Way::one;
  by_format(w.format, [&](auto format) { found = format.way(w, tokens, isa); });
  return found;
}

// For each part its format, whether it has a bias, and its scalars; and of `tensors`, from `used` on, those of its format, then the bias.
void read_parts(const char* op, const std::vector<Tensor>& tensors, size_t& used, const int64_t* layout, size_t length,
                std::vector<Matrix>& matrices) {
  for (size_t s = 0; s < length;) {
    const bool known = s + 2 <= length && by_format(layout[s], [&](auto format) {
      STD_TORCH_CHECK(s + 2 + format.kScalars <= length, op, ": the layout ends early, at entry ", s);
      const size_t bias_at = used + format.kTensors, end = bias_at + (layout[s + 1] != 0);
      STD_TORCH_CHECK(end <= tensors.size(), op, ": the layout names more tensors than the ", tensors.size(), " given");
      std::optional<Tensor> bias;
      if (end > bias_at) bias = tensors[bias_at];
      matrices.push_back(format.read(op, tensors.data() + used, bias, layout + s + 2));
      used = end;
      s += 2 + format.kScalars;
    });
    STD_TORCH_CHECK(known, op, ": the layout names no format, or ends early, at entry ", s);
  }
}

}  // namespace
