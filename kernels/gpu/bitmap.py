"""Bitmaps on a GPU: tiles of 16 rows of W are decoded on the fly, for gathers of single rows of x or for the matrix units.

Where a weight's value lies is known from the number of set bits before it: of the panel's earlier columns by a running sum, of the
column's earlier rows by a count of bits. A program that starts in the middle of a panel first counts the bits before it, a
sixteenth of a bit of reading per weight.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparsec.formats.bitmap import Bitmap
from sparsec.formats.panels import LANES, lane_columns
from sparsec.kernels.gpu.launch import MANY, Config, Launch, interpreted, pick, rows_at_once, splits
from sparsec.kernels.gpu.sums import Partial, multiply

PRODUCT = (
    Config({"TILE": 256}),
    Config({"TILE": 128}, warps=2),
    Config({"TILE": 512}),
    Config({"TILE": 512}, warps=8),
)
"""For one or two rows of x."""
SEVERAL = (*PRODUCT[:2], Config({"TILE": 128}), PRODUCT[3])
MATRIX = (
    Config({"TILE": 64}, stages=1),
    Config({"TILE": 32}, stages=1),
    Config({"TILE": 128}, warps=8, stages=1),
    Config({"TILE": 32}, warps=2, stages=1),
)
EXPAND = Config({"TILE": 256})
LEAST = 16
"""Rows of what the matrix units multiply."""
UNITS = 8
"""Rows of x from which on the matrix units multiply."""


@triton.jit
def count_bits(v):
    """Set bits of a uint32. The compiler makes one instruction of it as long as it does not know some of the bits to be zero."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def words_at(bits, panel, steps, step_count):
    """The bits of a panel's steps, as uint32; 0 past the last one. Those of 16 bits are widened by the sign."""
    words = tl.load(bits + panel * step_count + steps, mask=steps < step_count, other=0)
    return words.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def count_kept(words, LANE: tl.constexpr):
    """Kept weights of each step, and how many set bits are above its own."""
    above = ((words >> 31) * 16).to(tl.int32) if LANE == 1 else tl.zeros_like(words).to(tl.int32)
    return count_bits(words) - above, above


@triton.jit
def decode(values, words, start, LANE: tl.constexpr):
    """For each column of a lane the weights [steps, 16] of the steps whose bits are `words`, and where the next step's start."""
    counts, above = count_kept(words, LANE)
    end = start + tl.cumsum(counts, 0) + above
    rest = words[:, None] >> (tl.arange(0, 16) * LANE).to(tl.uint32)[None, :]
    at = end[:, None] - count_bits(rest)
    first = rest & 1
    w = (tl.load(values + at, mask=first != 0, other=0.0),)
    if LANE == 2:
        w = w + (tl.load(values + (at + first.to(tl.int32)), mask=(rest & 2) != 0, other=0.0),)
    return w, start + tl.sum(counts, 0)


@triton.jit
def side_by_side(w, LANE: tl.constexpr):
    """The weights [columns, 16] of steps."""
    if LANE == 1:
        return w[0]
    else:
        pairs = tl.permute(tl.join(w[0], w[1]), (0, 2, 1))
        return tl.reshape(pairs, [2 * pairs.shape[0], 16])


@triton.jit
def bitmap_kernel(
    x, values, bits, panel_ptr, bias, out, out_features, in_features, tokens, span,
    LANE: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, M: tl.constexpr, UNITS: tl.constexpr,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = TILE // LANE
    panel = tl.program_id(0)
    rows = panel * 16 + tl.arange(0, 16)
    token = tl.program_id(2) * M
    start = tl.load(panel_ptr + panel)
    step_count = tl.cdiv(in_features, LANE)
    low = tl.program_id(1) * span
    if SPLITS > 1:
        before = tl.zeros([STEPS], tl.int32)
        for k in range(0, low // LANE, STEPS):
            counts, _ = count_kept(words_at(bits, panel, k + tl.arange(0, STEPS), step_count), LANE)
            before += counts
        start += tl.sum(before, 0)
    if UNITS:
        tokens_here = token + tl.arange(0, M)
        sums = tl.zeros([M, 16], tl.float32)
        for k in range(low, tl.minimum(low + span, in_features), TILE):
            columns = k + tl.arange(0, TILE)
            words = words_at(bits, panel, k // LANE + tl.arange(0, STEPS), step_count)
            w, start = decode(values, words, start, LANE)
            # Past the last row of x the last one is read again, and nothing is stored.
            at = tl.minimum(tokens_here, tokens - 1)[:, None] * in_features + columns[None, :]
            xs = tl.load(x + at, mask=(columns < in_features)[None, :], other=0.0)
            sums = multiply(xs, side_by_side(w, LANE), sums, WIDE)
        if HAS_BIAS:
            sums += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)[None, :]
        place = (tl.program_id(1) * tokens + tokens_here)[:, None] * out_features + rows[None, :]
        limit = tl.where(tokens_here < tokens, out_features, 0)
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=rows[None, :] < limit[:, None])
    else:
        totals = (tl.zeros([STEPS, 16], tl.float32),) * M
        for k in range(low, tl.minimum(low + span, in_features), TILE):
            steps = k // LANE + tl.arange(0, STEPS)
            w, start = decode(values, words_at(bits, panel, steps, step_count), start, LANE)
            added = ()
            for m in tl.static_range(M):
                total = totals[m]
                for c in tl.static_range(LANE):
                    columns = steps * LANE + c
                    at = tl.minimum(token + m, tokens - 1) * in_features + columns
                    xs = tl.load(x + at, mask=columns < in_features, other=0.0)
                    total += w[c].to(tl.float32) * xs.to(tl.float32)[:, None]
                added = added + (total,)
            totals = added
        for m in tl.static_range(M):
            total = tl.sum(totals[m], 0)
            if HAS_BIAS:
                total += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)
            place = (tl.program_id(1) * tokens + token + m) * out_features + rows
            limit = tl.where(token + m < tokens, out_features, 0)
            tl.store(out + place, total.to(out.dtype.element_ty), mask=rows < limit)


@triton.jit
def bitmap_expand_kernel(
    values, bits, panel_ptr, dense, out_features, in_features, LANE: tl.constexpr, TILE: tl.constexpr
):
    STEPS: tl.constexpr = TILE // LANE
    panel = tl.program_id(0)
    rows = panel * 16 + tl.arange(0, 16)
    start = tl.load(panel_ptr + panel)
    for k in range(0, in_features, TILE):
        words = words_at(bits, panel, k // LANE + tl.arange(0, STEPS), tl.cdiv(in_features, LANE))
        w, start = decode(values, words, start, LANE)
        columns = k + tl.arange(0, TILE)
        limit = tl.where(rows < out_features, in_features, 0)
        tl.store(
            dense + rows[None, :].to(tl.int64) * in_features + columns[:, None],
            side_by_side(w, LANE),
            mask=columns[:, None] < limit[None, :],
        )


def bitmap(x: Tensor, packed: Bitmap, bias: Tensor | None) -> Tensor:
    """x [tokens, in] @ W.T + bias -> [tokens, out]."""
    if x.shape[0] > MANY:
        return F.linear(x, expand(packed), bias)
    (tokens, in_features), out_features = x.shape, packed.shape[0]
    units = tokens >= UNITS
    m = max(LEAST, triton.next_power_of_2(tokens)) if units else rows_at_once(tokens)
    choices = MATRIX if units else PRODUCT if m <= 2 else SEVERAL
    config = pick(f"bitmap {m}", choices)
    tile = config.constants["TILE"]
    panels, turns = triton.cdiv(out_features, LANES), triton.cdiv(in_features, tile)
    partial = Partial.of(x, out_features, bias, splits(x.device, panels, turns))
    Launch(
        bitmap_kernel,
        (panels, partial.splits, triton.cdiv(tokens, m)),
        {**packed.tensors(), **partial.arguments(), "span": triton.cdiv(turns, partial.splits) * tile},
        {"LANE": lane_columns(x.dtype), **partial.constants(), "M": m, "UNITS": units, "WIDE": interpreted()},
        config,
        LANES * tile,
        choices,
    ).run()
    return partial.result()


def expand(packed: Bitmap) -> Tensor:
    """The dense matrix [out, in]."""
    out_features, in_features = packed.shape
    dense = packed.values.new_empty(out_features, in_features)
    Launch(
        bitmap_expand_kernel,
        (triton.cdiv(out_features, LANES),),
        {**packed.tensors(), "dense": dense, "out_features": out_features, "in_features": in_features},
        {"LANE": lane_columns(packed.dtype)},
        EXPAND,
        elements=LANES * EXPAND.constants["TILE"],
    ).run()
    return dense
