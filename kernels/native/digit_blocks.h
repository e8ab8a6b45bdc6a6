// A few rows of x times blocks of codes that are not expanded. digits.h includes this where what it needs is there.
#pragma once

namespace {

inline int32_t wrapped(int32_t a, int32_t b) { return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }

// Scales of half h of the rows, 0 for the others.
SPARSEC_DIGITS inline Lanes half_scales_at(const uint16_t* from, int h) {
  float s[16] = {};
  for (int l = 8 * h; l < 8 * h + 8; ++l) s[l] = from_bits(static_cast<uint32_t>(from[l]) << 16);
  return load_lanes(s);
}

// Blocks of whole lanes: only they are read and multiplied. What 128 adds to the codes of some steps is taken away after them. Every row
// of a block keeps all of it where groups have a middle, so that this tells the sum over what is kept as well. A panel whose halves lie in
// two rows of blocks (Whole is false) is gone through twice.
template <int Bits, bool Whole, int M, int D, bool Middle>
SPARSEC_DIGITS void digits_of_blocks(const DigitTask& t) {
  const sparsec::Matrix& w = *t.matrix;
  const int64_t across = sparsec::digit_columns(w) / 4, groups = sparsec::digit_groups_of(w), high = w.c / 4;
  const DigitTile tile = tile_of(t, 0, groups, M, D);
  for (int64_t p = t.first; p < t.last; ++p) {
    Lanes total[M] = {};
    for (int h = 0; h < (Whole ? 1 : 2); ++h) {
      const int64_t first = 16 * p + 8 * h, unit = first / w.r, row = first % w.r;
      if (first >= w.out_features) break;
      IntSums sums[M][D];
      int32_t taken[M][D];
      int64_t group = -1;
      const auto finish_group = [&]() SPARSEC_DIGITS {
        if (group >= 0) {
          const uint16_t* const scales = w.scale + (p * w.groups + (w.group ? group * 4 * across / w.group : 0)) * (Middle ? 32 : 16);
          const Lanes scale = Whole ? scales_at(scales) : half_scales_at(scales, h);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
            for (int d = 0; d < D; ++d) add_to_all(sums[m][d], taken[m][d]);
            add_scaled(total[m], number_of(sums[m]), scale, tile.scale[group * M + m]);
            if (Middle) {
              IntSums kept[D];
              for (int d = 0; d < D; ++d) kept[d] = all_lanes(taken[m][d] / -128);
              const Lanes middle = Whole ? scales_at(scales + 16) : half_scales_at(scales + 16, h);
              add_scaled(total[m], number_of(kept), middle, tile.scale[group * M + m]);
            }
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
          for (int d = 0; d < D; ++d) {
            sums[m][d] = all_lanes(0);
            taken[m][d] = 0;
          }
      };
      finish_group();
      for (int64_t at = w.start[unit]; at < w.start[unit + 1]; ++at) {
        BlockSteps<Bits, Whole> reader(w, at, row, h);
        int64_t k = block_column(w, at) * high;
        for (const int64_t end = k + high; k < end;) {
          if (k / across != group) {
            finish_group();
            group = k / across;
          }
          const int64_t stop = least(end, (group + 1) * across);
          for (int m = 0; m < M; ++m)
            for (int d = 0; d < D; ++d) taken[m][d] += wrapped(t.before[(stop * M + m) * D + d], t.before[(k * M + m) * D + d]);
          const uint32_t* x = tile.x + k * M * D;
          for (; k < stop; ++k, x += M * D) {
            const Quads step = reader.take();
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
              for (int d = 0; d < D; ++d) sums[m][d] = dot(sums[m][d], step, x[m * D + d]);
          }
        }
      }
      finish_group();
    }
    float totals[16 * M];
    for (int m = 0; m < M; ++m) store_lanes(totals + 16 * m, total[m]);
    finish_any(t, p, totals);
  }
}

}  // namespace
